"""What is not installed, or cannot be shared, is said before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shearling.data.store import Store
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.recipes.plan import plan_recipe
from shearling.recipes.read import read_recipe
from shearling.train import installed, setup
from shearling.train.heal import heal
from shearling.train.installed import check_installed
from shearling.train.options import Options

EIGHT_BITS = {"optimizer": "adamw8bit"}


def options(**changed: Any) -> Options:
    return Options.model_validate({"tokens": 6 * 4 * 24, "batch": 4} | changed)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the packages that are asked about is there."""
    monkeypatch.setattr(installed, "find_spec", lambda name: None)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (EIGHT_BITS, r"torchao is not installed; pip install 'shearling\[quantize\]'"),
        ({"recipe": "lora"}, r"peft is not installed; pip install 'shearling\[lora\]'"),
        ({"recipe": "cpt-then-lora"}, "peft is not installed"),
        ({"trackers": ["wandb"]}, "the tracker wandb was asked for, but it is not installed"),
    ],
)
def test_a_package_that_is_missing(
    bare: None, model: Checkpoint, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, Any], said: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(setup, "loaded", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ShearlingError, match=said):
        heal(model, store, options(**changed), tmp_path / "out")
    heals = ", ".join(f"{key}: {value}" for key, value in changed.items())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"{{shearling: 1, source: {model.path}, data: {{store: {store.path}}}, "
        f"target: {{layers: 2}}, method: {{kind: scores, criteria: magnitude}}, "
        f"heal: {{tokens: 200, batch: 4, {heals}}}}}".replace("'", "")
    )
    with pytest.raises(ShearlingError, match=said):
        plan_recipe(read_recipe(str(recipe)))


def test_what_is_not_asked_for_need_not_be_there(bare: None) -> None:
    check_installed(options())


def test_what_ranks_cannot_share() -> None:
    check_installed(options(batch=6), ranks=3)
    with pytest.raises(ShearlingError, match="4 sequences cannot be split over 3 ranks.*batch=6"):
        check_installed(options(), ranks=3)
    with pytest.raises(ShearlingError, match="adamw8bit was given on 2 ranks"):
        check_installed(options(**EIGHT_BITS), ranks=2)
