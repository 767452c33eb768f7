"""A tiny model and its text, and the laptop recipe run on them once."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shearling.recipes.run import RecipeRun
from tiny_farm import Farm
from tiny_tokenizer import write_llama


@pytest.fixture(scope="session")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Farm:
    root = tmp_path_factory.mktemp("farm")
    model = write_llama(root / "model", layers=5)
    draw = random.Random(0)
    words = ["sheep", "gate", "wool", "went", "through", "the", "hill"]
    texts = [" ".join(draw.choices(words, k=draw.randint(8, 40))) for _ in range(150)]
    text = root / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": one}) for one in texts))
    return Farm(root, model, text)


@pytest.fixture(scope="session")
def whole(farm: Farm) -> tuple[RecipeRun, dict[str, Any]]:
    """An undisturbed run, which nobody may change, and what it says of itself."""
    run = farm.run("whole")
    return run, run.run()


@pytest.fixture
def copied(farm: Farm, whole: Any, tmp_path: Path) -> Callable[..., RecipeRun]:
    """The same recipe, changed perhaps, in a copy of the undisturbed run."""
    target = tmp_path / "run"
    shutil.copytree(whole[0].output, target, copy_function=shutil.copy2)
    return lambda *pairs, **how: farm.run(str(target), *pairs, **how)
