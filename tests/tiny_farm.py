"""A tiny model and its text, on which recipes are run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shearling.recipes.read import read_recipe
from shearling.recipes.run import RecipeRun

# What makes the laptop recipe one for a model of 64 positions and a few thousand tokens.
SMALL = (
    "data.length=32", "data.held_out=0.1", "heal.tokens=600", "heal.save_every=3",
    "heal.eval_every=100", "heal.eval_sequences=2", "heal.lr=1e-2", "method.samples=4",
    "method.length=16", "method.written=2",
    "evaluate.windows=2", "evaluate.window=32", "bench.prompts=[4]", "bench.new=[2]",
    "bench.repeats=1", "bench.budget=null",
)  # fmt: skip


@dataclass
class Farm:
    """A model, a text, and runs of a recipe on them."""

    root: Path
    model: Path
    text: Path
    said: list[str] = field(default_factory=list)

    def run(self, output: str, *pairs: str, recipe: str = "laptop", **how: Any) -> RecipeRun:
        """A recipe in a directory of this name, checked and planned."""
        self.said.clear()
        small = SMALL if recipe == "laptop" else ()
        changes = {"source": str(self.model), "data.text": str(self.text)}
        read = read_recipe(recipe, [*small, *pairs], changes)
        return RecipeRun(read, self.root / output, notify=self.said.append, **how)
