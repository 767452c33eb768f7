"""Shapes that llama.cpp does not load are told before any work, with one that it does.

The reference is what refuses the export: `shearling.ship.computes.check_counted`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shearling import cli
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.exportable import tell_limits
from shearling.pruning.pattern import pattern_of
from shearling.pruning.prune import Criteria, Pruning, Running, Size
from shearling.recipes.plan import plan_recipe
from shearling.recipes.read import read_recipe
from shearling.ship.computes import check_counted

Models = Callable[[str], Path]
FIRST = "transformers loads this shape, but `shearling export` will refuse it: "


def told(source: Checkpoint, **sizes: int) -> list[str]:
    said: list[str] = []
    tell_limits(source, source.shape.with_(**sizes), said.append)
    assert all(one.startswith(FIRST) for one in said)
    return [one.removeprefix(FIRST) for one in said]


def deep(source: Checkpoint, layers: int) -> Checkpoint:
    """A model with more blocks, as far as sizes go."""
    return replace(source, shape=source.shape.with_(layers=layers))


@pytest.mark.parametrize(
    ("variant", "sizes", "instead"),
    [
        ("qwen2", {"heads": 6}, {"hidden": 24, "heads": 6}),
        ("qwen2", {"hidden": 24}, {"hidden": 24, "heads": 6}),
        ("phi3", {"hidden": 32}, {"hidden": 36, "heads": 9}),
        ("olmo2", {"heads": 3, "kv_heads": 1}, {"hidden": 12, "heads": 3}),
        ("cohere2", {"heads": 6}, {"hidden": 24, "heads": 6}),
        ("granite", {"heads": 3}, {"hidden": 12, "heads": 3}),
    ],
)
def test_what_is_told_is_refused_and_what_is_named_instead_is_not(
    models: Models, variant: str, sizes: dict[str, int], instead: dict[str, int]
) -> None:
    source = Checkpoint.open(models(variant))
    asked = source.shape.with_(**sizes)
    (said,) = told(source, **sizes)
    near = {axis: int(size) for axis, size in re.findall(r"(\w+)=(\d+)", said.split(";")[-1])}
    assert said.endswith("would do.")
    assert instead.items() <= near.items()
    with pytest.raises(ShearlingError, match="cannot be exported to GGUF") as refused:
        check_counted(replace(source, shape=asked))
    wants = said.split(" wants ")[1].split(";")[0]
    assert f"wants {wants}" in str(refused.value)
    source.family.check(source.config, asked.with_(**near))
    check_counted(replace(source, shape=asked.with_(**near)))


@pytest.mark.parametrize(
    ("variant", "sizes"),
    [
        ("llama", {"heads": 6, "hidden": 24}),
        ("qwen2", {"heads": 6, "hidden": 24}),
        ("qwen2", {"layers": 3, "mlp": 8}),
        ("olmoe", {"heads": 3, "kv_heads": 1}),  # the source itself is refused
        ("opt", {"hidden": 24}),  # llama.cpp does not know it
    ],
)
def test_what_is_no_fault_of_the_shape_is_not_told(
    models: Models, variant: str, sizes: dict[str, int]
) -> None:
    assert told(Checkpoint.open(models(variant)), **sizes) == []


def test_numbers_of_blocks_that_it_takes_for_another_model(models: Models) -> None:
    deepseek = deep(Checkpoint.open(models("deepseek_v3")), 30)
    (said,) = told(deepseek, layers=27)
    assert "this one has 27 blocks; layers=28 would do." in said
    assert told(deepseek, layers=28) == []
    gemma = Checkpoint.open(models("gemma3"))
    (said,) = told(deep(gemma, 64), layers=62)
    assert "a gemma3 of 62 blocks by the root of" in said
    assert "layers=61 would do." in said


@pytest.fixture
def smollm3(models: Models) -> Checkpoint:
    """Blocks with rotary positions, as llama.cpp counts them, but for the fourth."""
    source = Checkpoint.open(models("smollm3"))
    source.config.no_rope_layers = [1, 1, 1, 0, 1]
    return source


def test_blocks_without_positions_have_a_pattern(smollm3: Checkpoint, tmp_path: Path) -> None:
    """`--keep-pattern` keeps that of a SmolLM 3, and whoever breaks it is told."""
    pattern = pattern_of(smollm3.family, smollm3.config)
    assert pattern is not None
    assert pattern.removals(1, 9) == [(4,)]
    for size, said in ((Size(remove=(4,)), 0), (Size(remove=(1,)), 1)):
        lines: list[str] = []
        pruning = Pruning.of(smollm3, size, running=Running(notify=lines.append))
        from shearling.pruning.settle import tell_pattern

        tell_pattern(smollm3, pruning.run().choose(pruning.wanted).keep, lines.append)
        assert sum("with and without rotary positions" in line for line in lines) == said
    with pytest.raises(ShearlingError, match="remove 4 instead"):
        Pruning.of(smollm3, Size(remove=(1,)), criteria=Criteria(keep_pattern=True))


def test_a_number_of_blocks_that_no_removal_leaves_in_order(models: Models) -> None:
    source = Checkpoint.open(models("gemma3"))
    pattern = pattern_of(source.family, source.config)
    assert pattern is not None
    for layers in range(1, source.shape["layers"]):
        said = any("leave the others in that order" in one for one in told(source, layers=layers))
        in_order = pattern.holds(range(len(pattern.kinds)))
        assert said == (in_order and layers not in pattern.depths())


def test_a_command_tells_it_before_any_work(models: Models, tmp_path: Path) -> None:
    arguments = ["prune", models("qwen2"), "--output", tmp_path / "out"]
    arguments += ["--by", "magnitude,magnitude-l2", "--shape", "heads=6"]
    ran = CliRunner().invoke(cli.app, [*map(str, arguments), "--dry-run"])
    assert ran.exit_code == 0, ran.output
    assert f"shearling: warning: {FIRST}llama.cpp's code for qwen2 wants hidden" in ran.stderr
    assert ran.stderr.count("`shearling export` will refuse") == 1
    sizes = ["--shape", "heads=6,layers=4", "--shape", "heads=6,layers=3"]
    ran = CliRunner().invoke(cli.app, [*map(str, arguments[:-2]), *sizes, "--dry-run"])
    assert ran.stderr.count("`shearling export` will refuse") == 1


def test_a_recipe_tells_it_as_it_is_planned(models: Models, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"shearling: 1\nsource: {models('qwen2')}\ntarget: {{shape: {{heads: 6}}}}\n"
        "method: {kind: scores, criteria: 'magnitude,magnitude-l2'}\nreport: {}\n"
    )
    said: list[str] = []
    plan_recipe(read_recipe(str(file), [], {"device": "cpu"}), said.append)
    assert sum(one.startswith(FIRST) for one in said) == 1
