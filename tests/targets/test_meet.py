"""Targets are met by what a timer says, with no model run."""

from __future__ import annotations

import pytest

from fake_timer import FakeTimer, plain
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.plan import Spending
from shearling.table.values import Shape
from shearling.targets.asked import TargetLoad, Targets, footprint
from shearling.targets.meet import first_shapes, meet
from shearling.targets.say import target_lines


@pytest.fixture
def source(models) -> Checkpoint:
    return Checkpoint.open(models("llama"))


def test_a_speed_is_met_at_the_first_try_where_the_model_holds(source: Checkpoint) -> None:
    timer, told = FakeTimer(source.shape, plain), []
    plan = meet(source, Targets(speed="1.2x"), Spending(), timer=timer, notify=told.append)
    assert [len(shapes) for shapes, _ in timer.asked] == [3, 3, 1]
    assert [batch for _, batch in timer.asked] == [None, 8, None]
    assert plain(source.shape) / plain(plan.shape) >= 1.2
    account = plan.as_json()
    assert account["predicted"]["speed"] == pytest.approx(plain(source.shape) / plain(plan.shape))
    assert account["wanted"] == {"speed": "1.2x"}
    assert account["measured"]["parameters"] == source.layout.count(plan.shape)
    assert [row["shape"] for row in account["table"]] == [
        dict(source.shape), *(dict(s) for s in first_shapes(source, "mlp", Spending()))
    ]  # fmt: skip
    lines = "\n".join(target_lines(account, source.shape))
    assert "asked       --speed 1.2x" in lines
    assert "mlp=32: " in lines
    assert any("with 1 at a time" in line and "with 8" in line for line in told)


def test_another_batch_is_only_told_of(source: Checkpoint) -> None:
    """llama.cpp times several sequences with a program of its own, which may not be there."""

    def one_alone(shape: Shape, batch: int) -> float:
        if batch > 1:
            raise ShearlingError("llama-batched-bench is not there.")
        return plain(shape)

    told: list[str] = []
    timer = FakeTimer(source.shape, one_alone)
    plan = meet(source, Targets(speed="1.2x"), Spending(), timer=timer, notify=told.append)
    whole = meet(source, Targets(speed="1.2x"), Spending(), timer=FakeTimer(source.shape, plain))
    assert plan.shape == whole.shape
    assert plan.as_json()["table_at_another_batch"] == []
    assert "nothing was timed with 8 at a time: llama-batched-bench is not there." in told


def test_what_misses_is_searched_again_with_what_was_learned(source: Checkpoint) -> None:
    """Shapes between those of the table run slower than between them: the model is corrected."""
    known = [source.shape, *first_shapes(source, "mlp", Spending())]

    def rough(shape: Shape, batch: int) -> float:
        return plain(shape) * (1 if shape in known else 1.15)

    timer = FakeTimer(source.shape, rough)
    plan = meet(source, Targets(speed="1.3x"), Spending(), timer=timer)
    assert len(plan.tries) == 2
    speeds = [one.speed for one, _ in plan.tries]
    assert speeds[0] < 1.3 * 0.95 <= speeds[1]
    assert plan.timed is not None
    assert plan.timed.speed == speeds[1]


def test_what_is_never_reached_is_told(source: Checkpoint) -> None:
    known = [source.shape, *first_shapes(source, "mlp", Spending())]

    def stubborn(shape: Shape, batch: int) -> float:
        return plain(shape if shape in known else source.shape)

    timer, told = FakeTimer(source.shape, stubborn), []
    meet(source, Targets(speed="1.3x"), Spending(), timer=timer, notify=told.append)
    assert "--speed 1.3x was not reached within 5%" in told[-1]
    assert "1.00x as fast" in told[-1]


def test_a_latency_and_a_size_hold_together(source: Checkpoint) -> None:
    timer = FakeTimer(source.shape, plain)
    latency = 0.8 * plain(source.shape)
    asked = Targets(latency=f"{1e3 * latency:.4f}ms", params="0.6x", footprint="0.9x")
    plan = meet(source, asked, Spending(), timer=timer)
    assert plain(plan.shape) <= latency * 1.0001
    assert source.layout.count(plan.shape) <= 0.6 * source.parameters


def test_narrower_that_runs_no_faster_is_said(source: Checkpoint) -> None:
    timer, told = FakeTimer(source.shape, lambda shape, batch: 1 + shape["layers"]), []
    plan = meet(source, Targets(speed="1.4x"), Spending(), timer=timer, notify=told.append)
    assert plan.shape["mlp"] == source.shape["mlp"]
    assert any("mlp 50 -> 32 removes" in line and "buys little speed" in line for line in told)


def test_memory_is_counted_and_nothing_timed(source: Checkpoint) -> None:
    load = TargetLoad(context=64)
    plan = meet(source, Targets(footprint="0.8x", load=load), Spending())
    account = plan.as_json()
    whole = account["measured"]["footprint_bytes"] / 0.8
    assert source.bytes + 2 * 2 * 5 * 3 * 6 * 64 >= whole
    assert "table" not in account


@pytest.mark.parametrize("engine", ["llama.cpp"])
def test_words_are_not_cut_for_a_converter_that_refuses_them(source, engine: str) -> None:
    asked = Targets(speed="1.2x", load=TargetLoad(engine=engine))
    spending = Spending(axes=("layers", "vocab"))
    with pytest.raises(ShearlingError, match="converter refuses"):
        meet(source, asked, spending, timer=FakeTimer(source.shape, plain))


def test_the_nearest_is_named(source: Checkpoint) -> None:
    timer = FakeTimer(source.shape, plain)
    with pytest.raises(ShearlingError, match=r"--speed 50x cannot be met.*gives --speed 2\.48x"):
        meet(source, Targets(speed="50x"), Spending(), timer=timer)


def test_a_latency_that_the_source_has(source: Checkpoint) -> None:
    timer = FakeTimer(source.shape, plain)
    said = r"--latency 20s was given, but .*llama.* takes 14 ms a token already; .* such as 11ms"
    with pytest.raises(ShearlingError, match=said):
        meet(source, Targets(latency="20s"), Spending(), timer=timer)
    assert timer.asked == [([], None)]  # the source alone


def test_times_that_make_no_sense_are_said(source: Checkpoint) -> None:
    """Every other shape a hundred times as fast, which no sum of parts explains."""
    timer = FakeTimer(source.shape, lambda shape, batch: 1 if shape == source.shape else 0.01)
    said = (
        r"--speed 1.3x needs 769 ms a token, and .* promise that of .*llama.* as it is "
        r"\(\d+\S* ms\), which was measured at 1000 ms.*more --repeats, more --new or a quieter"
    )
    with pytest.raises(ShearlingError, match=said):
        meet(source, Targets(speed="1.3x"), Spending(), timer=timer)


def test_a_shape_that_was_tried_is_kept_where_times_then_make_no_sense(source: Checkpoint) -> None:
    known = [source.shape, *first_shapes(source, "mlp", Spending())]
    seconds = lambda shape, batch: plain(shape) * (1 if shape in known else 0.3)  # noqa: E731
    plan = meet(source, Targets(speed="1.3x"), Spending(), timer=FakeTimer(source.shape, seconds))
    assert [one.shape for one, _ in plan.tries] == [plan.shape]
    assert plan.shape != source.shape


def test_a_context_beyond_the_positions(source: Checkpoint) -> None:
    asked = Targets(footprint="0.8x", load=TargetLoad(context=99999))
    with pytest.raises(ShearlingError, match="--context 99999 was given, but .* at most 64"):
        meet(source, asked, Spending())


def test_a_footprint_out_of_reach_names_another_that_can_be_met(source: Checkpoint) -> None:
    load = TargetLoad(context=8)
    with pytest.raises(ShearlingError, match=r"gives --footprint (\S+), which") as raised:
        meet(source, Targets(footprint="0.0001MB", load=load), Spending())
    nearest = str(raised.value).split("gives --footprint ")[1].split(",")[0]
    meet(source, Targets(footprint=nearest, load=load), Spending())
    least = footprint(source, source.shape.with_(layers=1, mlp=32), load)
    below = f"{(least - 1) / 1e6:.6f}MB"
    with pytest.raises(ShearlingError, match=f"{least / 1e6:.6f}MB, which is the nearest"):
        meet(source, Targets(footprint=below, load=load), Spending())
