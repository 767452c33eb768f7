"""The commands by name. A command's module is imported when it is called, not when it is listed.

Importing all of them took longer than the rest of ``shearling --help``. So their first sentences
are here as well; a test holds them to the docstrings.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

# What each does, in the order of the help.
SUMMARIES = {
    "init": "Write a recipe from four answers: model, text, how small or how fast, which machine.",
    "run": "Make a smaller model by a recipe, stage by stage; goes on by itself if it was stopped.",
    "inspect": "Show a model's shape, exact counts, costs and lineage; reads headers, not weights.",
    "score": "Score every block of a model, or every unit of a width; the lowest is the first that "
    "can go.",
    "prune": "Cut a model to a shape or a size, repair it, and prove that it is what it claims.",
    "write": "Have a model write text from its own distribution, to calibrate or train with.",
    "pack": "Turn text and instruction data into a store of tokens to heal a model with.",
    "learn": "Learn which units to keep while training, and cut to exactly the shape asked for.",
    "heal": "Retrain a model on text or from its source; goes on by itself if it was stopped.",
    "teach": "Keep a teacher's likeliest next tokens on disk, for "
    "`shearling heal --teacher-cache`.",
    "reference": "Find the loss that each domain should come down to while a smaller model is "
    "healed.",
    "eval": "Measure perplexity, tasks, abilities and repetition of models, and show what they "
    "write.",
    "bench": "Time prefill and decode and measure memory, in turns when several models are given.",
    "judge": "Let a judge say which of two models answers better, both ways round; a win rate "
    "follows.",
    "compare": "Make one page that says which of several models to ship.",
    "studio": "Open a local page on which the models answer your prompts side by side.",
    "quantize": "Round a model's matrices to eight or four bits with torchao, and prove that it "
    "loads.",
    "export": "Write a model as a GGUF file with llama.cpp's converter, and compare it with the "
    "source.",
    "report": "Make one self-contained HTML page of everything that was measured.",
    "demo": "Make a real model smaller, measure what that did, and write a report: one command.",
}
_FUNCTIONS = {"eval": "evaluate"}  # those that are not called as their command is


class _Commands(MutableMapping[str, Any]):
    """Commands by name, each made when it is asked for."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name in SUMMARIES and name not in self._made:
            module = import_module(f"shearling.commands.{name}")
            alone = typer.Typer(
                add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
            )
            alone.command(name)(getattr(module, _FUNCTIONS.get(name, name)))
            self._made[name] = typer.main.get_command(alone)
        return self._made[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._made[name] = command

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"command {name!r} cannot be taken away")

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*SUMMARIES, *self._made]))

    def __len__(self) -> int:
        return len(list(iter(self)))


class Listed(TyperGroup):
    """A group of the commands above."""

    def __init__(self, **settings: Any) -> None:
        """As typer makes it, but for the commands."""
        super().__init__(**settings)
        self.commands = _Commands()

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List them in the help, without importing any."""
        named: dict[str, Any] = {
            name: TyperCommand(name, help=says) for name, says in SUMMARIES.items()
        }
        TyperGroup(name=self.name, commands=named).format_commands(ctx, formatter)
