"""Recipes as they are written: the shipped ones, changes, and every mistake in one sentence."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from shearling.errors import ShearlingError
from shearling.pruning.size import Size
from shearling.recipes.read import plain_recipe, read_recipe, recipe_of, shipped
from shearling.recipes.schema import GatesMethod, ScoresMethod, TargetSection
from shearling.recipes.target import LOAD
from shearling.targets.asked import Targets

PAPERS = {
    "shortened-ppl-lora", "shortened-taylor-lora", "shortened-cpt", "shortened-cpt-lora",
    "sheared-1.3b", "sheared-2.7b",
}  # fmt: skip
SMOLLM2 = {
    "shortened-ppl-lora-smollm2", "shortened-taylor-lora-smollm2", "shortened-cpt-smollm2",
    "shortened-cpt-lora-smollm2", "sheared-smollm2",
}  # fmt: skip
BUILT = "shearling: 1\nsource: model\ndata: {text: text.txt}\ntarget: {params: 0.8x}\n"


def written(tmp_path: Path, text: str) -> str:
    file = tmp_path / "own.yaml"
    file.write_text(text)
    return str(file)


def test_what_is_shipped() -> None:
    others = {"progressive", "experts", "shearling", "laptop"}
    assert set(shipped()) == PAPERS | SMOLLM2 | others


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_parses(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.source is not None
    assert recipe.about.endswith(".")
    assert recipe_of(plain_recipe(recipe), name) == recipe
    assert shipped()[name].startswith("# ")


def test_the_papers_constants() -> None:
    """Against the papers' own figures (arXiv 2310.06694 and 2402.02834), multiplied out here."""
    sheared = read_recipe("sheared-1.3b")
    gates, (heal,) = sheared.method, sheared.heal
    assert isinstance(gates, GatesMethod)
    learning, healing = gates.learning({}), heal.healing({}, heal.tokens or 0)
    assert learning.steps(4096) == 3200
    assert (learning.lr, learning.gate_lr, learning.multiplier_lr) == (1e-4, 1.0, 1.0)
    assert round(learning.warmup * 3200) == 320
    assert round(learning.rise * 3200) == 640
    assert (learning.constraint, learning.warm_start, learning.mix) == (
        "lagrangian", False, "dynamic",
    )  # fmt: skip
    assert healing.steps(4096) == 48_000
    assert (healing.batch, healing.warmup, healing.final) == (256, 0.03, 0.1)
    assert heal.reference == gates.reference
    assert sum(learning.weights.values() if learning.weights else []) == pytest.approx(1)
    shortened = read_recipe("shortened-taylor-lora")
    assert isinstance(shortened.method, ScoresMethod)
    cut = shortened.method
    assert (cut.criteria, cut.samples, cut.length, cut.refit) == ("taylor+", 10, 128, False)
    lora = shortened.heal[0].healing({}, 1)
    assert (lora.rank, lora.alpha, lora.lr, lora.batch) == (8, 16, 1e-4, 64)
    assert shortened.heal[0].epochs == 2


def test_a_target_says_what_prune_takes() -> None:
    """A size, targets and the load they are timed under; how it came about is no wish."""
    sizes = {one.name for one in fields(Size)} - {"account", "axes"}
    targets = {one.name for one in fields(Targets)} - {"load"}
    assert set(TargetSection.model_fields) == sizes | targets | set(LOAD)


def test_changes(tmp_path: Path) -> None:
    recipe = read_recipe(
        "shortened-cpt-lora",
        ["heal.1.lr=5e-4", "data.length=1024", "target.layers=20"],
        {"data.text": "own.txt"},
    )
    assert recipe.heal[1].healing({}, 1).lr == 5e-4
    assert recipe.heal[0].healing({}, 1).lr == 1e-4
    assert recipe.data is not None
    assert recipe.data.length == 1024
    assert recipe.data.specs == (str(Path("own.txt").resolve()),)


@pytest.mark.parametrize("pair", ["heal.2.lr=1", "heal.lr=1"])
def test_a_change_that_misses_a_list(pair: str) -> None:
    with pytest.raises(ShearlingError, match=r"reaches into a list of 2, where a number from 0 to"):
        read_recipe("shortened-cpt-lora", [pair])


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    name = written(tmp_path, BUILT.replace("{text: text.txt}", "{text: {pen: in/pen.txt}}"))
    recipe = read_recipe(name, ["evaluate.text=here.txt"])
    assert recipe.source == str(tmp_path / "model")
    assert recipe.data is not None
    assert recipe.data.specs == (f"pen={tmp_path / 'in/pen.txt'}",)
    assert recipe.evaluate is not None
    assert recipe.evaluate.texts == (str(Path("here.txt").resolve()),)


def test_steps_inherit(tmp_path: Path) -> None:
    recipe = read_recipe("progressive", ["steps.1.heal=null", "steps.2.method.kind=blocks"])
    assert [step.target.params for step in recipe.cuts] == ["0.85x", "0.72x", "0.6x"]
    assert [len(step.heal or ()) for step in recipe.cuts] == [1, 1, 1]  # null is not said
    assert [step.method.kind for step in recipe.cuts if step.method] == [
        "scores", "scores", "blocks",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("heals: {tokens: 1M}", "has the key heals, which is not known; the nearest is heal;"),
        ("heal: {tokens: 1M, lrr: 1}", "heal.0: lrr is not an option of healing.*nearest is lr"),
        ("heal: {lr: 1}", "at heal.0: give either tokens or epochs"),
        ("heal: {tokens: lots}", "tokens 'lots' was given, but a number such as 200k"),
        ("method: {smaples: 3}", "key method.smaples, .* the nearest is samples"),
        ("method: {kind: gates, tokens: 1M, gate_rl: 1}", "gate_rl is not .* nearest is gate_lr"),
        ("method: {kind: gates, tokens: 1M, recipe: hot}", "'hot' of gates is not known"),
        ("method: {kind: gates}", "lacks the key method.tokens"),
        ("method: {kind: magic}", "at method: .*'scores', 'blocks', 'gates'"),
        ("evaluate: {windws: 3}", "key evaluate.windws, .* the nearest is windows"),
        ("bench: {batches: [0]}", "at bench.batches.0: 0 was given, but at least 1 was"),
        ("data: {length: 8}", "at data: give either text .files. or store"),
        ("steps: [{target: {layers: 1}}]", "give either target .one cut. or steps"),
        ("target: {size: 2}", "key target.size, which is not known; .*there are shape, params"),
        ("device: [1]", "at device: .*a text was expected"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(tmp_path: Path, change: str, sentence: str) -> None:
    values = yaml.safe_load(BUILT) | yaml.safe_load(change)
    with pytest.raises(ShearlingError, match=f"(?s){sentence}") as refused:
        read_recipe(written(tmp_path, yaml.safe_dump(values)))
    assert str(refused.value).count("\n") == 0
    assert str(refused.value).endswith(".")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("shearling: 2\n", "is of version 2, but this program reads version 1; install a newer"),
        ("source: model\n", "begin it with `shearling: 1`"),
        ("shearling: true\n", "does not say which form"),
        ("- 1\n", "is not a mapping"),
        ("a: [", "is not YAML in line"),
    ],
)
def test_a_file_of_another_form(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ShearlingError, match=sentence):
        read_recipe(written(tmp_path, text))


def test_a_name_that_is_none() -> None:
    with pytest.raises(ShearlingError, match="nor a shipped recipe; the nearest is laptop; "):
        read_recipe("labtop")
