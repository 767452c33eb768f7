"""A recipe from four answers: what they become, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from shearling.errors import ShearlingError
from shearling.recipes.plan import plan_recipe
from shearling.recipes.read import read_recipe
from shearling.recipes.start import RecipeAnswers, recipe_text
from tiny_farm import Farm


def answered(farm: Farm, size: str, machine: str = "cpu") -> str:
    return recipe_text(RecipeAnswers(str(farm.model), (str(farm.text),), size, machine), farm.root)


def roomier(farm: Farm, place: Path) -> Farm:
    """The same with a model of as many positions as a timed target's prompt and answer take."""
    copied = shutil.copytree(farm.model, place / "roomier")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    return replace(farm, model=copied)


@pytest.mark.parametrize(
    ("size", "target", "kind"),
    [
        ("0.8x", {"params": "0.8x"}, "scores"),
        ("40k", {"params": "40k"}, "scores"),
        ("3 blocks", {"layers": 3}, "blocks"),
        ("1.3x faster", {"speed": "1.3x"}, "scores"),
        (" 1.25 faster", {"speed": "1.25x"}, "scores"),
        ("20 ms", {"latency": "20ms"}, "scores"),
        ("0.7x memory", {"footprint": "0.7x"}, "scores"),
        ("0.9x of the memory", {"footprint": "0.9x"}, "scores"),
        ("180KiB", {"footprint": "180KiB"}, "scores"),
    ],
)
def test_how_small_or_how_fast(
    farm: Farm, tmp_path: Path, size: str, target: dict[str, object], kind: str
) -> None:
    values = yaml.safe_load(answered(roomier(farm, tmp_path), size))
    assert values["target"] == target
    assert values["method"]["kind"] == kind


def test_a_recipe_that_can_be_planned(farm: Farm, tmp_path: Path) -> None:
    answers = RecipeAnswers(str(farm.model), (f"pen={farm.text}",), "0.8x", "gpu")
    (tmp_path / "recipe.yaml").write_text(recipe_text(answers, tmp_path))
    recipe = read_recipe(str(tmp_path / "recipe.yaml"))
    assert recipe.heal[0].recipe == "distill"
    stages = [stage.kind.name for stage in plan_recipe(recipe)]
    assert stages == ["pack", "text", "prune", "heal", "evaluate", "bench", "report"]


def test_relative_paths_follow_the_recipe(
    farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(farm.root)
    (tmp_path / "deep").mkdir()
    text = recipe_text(RecipeAnswers("model", ("text.jsonl",), "0.8x", "cpu"), tmp_path / "deep")
    (tmp_path / "deep" / "own.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe("deep/own.yaml")
    assert recipe.source == str(farm.model.resolve())
    assert recipe.data is not None
    assert Path(recipe.data.specs[0]).samefile(farm.text)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": "nowhere/at/all"}, "nowhere/at/all is neither a directory"),
        ({"text": ("nowhere.txt",)}, "There is no text at nowhere.txt"),
        ({"size": "tiny"}, "'tiny' was given, but a share such as 0.8x"),
        ({"size": "0.01x"}, "target cannot be met: .* parameters were asked for"),
        ({"size": "0.9x faster"}, "'0.9x' was given, but a factor above 1"),
        ({"size": "1..3x faster"}, "'1..3x' was given, but a factor above 1"),
        ({"size": "0 ms"}, "'0ms' was given, but a time for each new token"),
        ({"size": "8GB"}, "asks for 8.00GB, but the model takes"),
        ({"size": "7 blocks"}, "target cannot be met: .*7"),
        ({"machine": "abacus"}, "--machine 'abacus' was given, but cpu, gpu or auto"),
    ],
)
def test_answers_that_cannot_be_used(farm: Farm, change: dict[str, object], sentence: str) -> None:
    given = {"model": str(farm.model), "text": (str(farm.text),), "size": "0.8x", "machine": "cpu"}
    with pytest.raises(ShearlingError, match=sentence):
        recipe_text(RecipeAnswers(**given | change), farm.root)
