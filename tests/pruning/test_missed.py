"""Sizes that come out well below what was asked for are said, with the step that is why."""

from __future__ import annotations

from shearling.model.checkpoint import Checkpoint
from shearling.pruning.plan import Spending
from shearling.pruning.settle import settle_size
from shearling.pruning.size import Size
from shearling.targets.asked import TargetLoad, Targets
from shearling.targets.meet import meet


def told(source: Checkpoint, **asked: object) -> tuple[float, list[str]]:
    """The share that is left, and what was said."""
    said: list[str] = []
    after, _ = settle_size(Size(**asked), source, None, said.append)  # ty: ignore
    return source.layout.count(after) / source.parameters, said


def test_neurons_go_in_steps(models) -> None:
    source = Checkpoint.open(models("llama"))
    share, said = told(source, params="0.9x")
    assert share < 0.98 * 0.9
    assert said == [
        f"--params 0.9x was asked for, and the shape that keeps within it has {share:.3g}x, as "
        "neurons go 8 at a time from every block."
    ]
    count = round(0.9 * source.parameters)
    _, (said,) = told(source, params=count)
    assert said.startswith(f"--params {count} was asked for")
    assert f"has {round(share * source.parameters):,} parameters" in said


def test_experts_go_in_steps(models) -> None:
    source = Checkpoint.open(models("qwen3_moe"))
    _, (said,) = told(source, params="0.8x")
    assert said.endswith("as experts go one at a time from every block.")


def test_blocks_go_whole(models) -> None:
    source = Checkpoint.open(models("llama"))
    _, (said,) = told(source, params="0.8x", axes="layers")
    assert said.endswith("as blocks go whole.")


def test_nothing_is_said_of_what_is_near(models) -> None:
    source = Checkpoint.open(models("llama"))
    share, _ = told(source, params="0.9x")
    assert told(source, params=f"{1.01 * share:.4f}x")[1] == []


def test_a_footprint_likewise(models) -> None:
    source, said = Checkpoint.open(models("llama")), []
    asked = Targets(footprint="0.8x", load=TargetLoad(context=8))
    meet(source, asked, Spending(axes=("layers",)), notify=said.append)
    assert said[0].startswith("--footprint 0.8x was asked for, and the shape that keeps within it")
    assert said[0].endswith("as blocks go whole.")
