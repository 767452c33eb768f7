"""A cost model finds the parts that made the times, and no negative ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shearling.table.values import Shape
from shearling.targets.costs import CostModel, TimedShape, fitted

BEFORE = Shape({"layers": 30, "mlp": 1536, "vocab": 49152})
SHAPES = [
    BEFORE, BEFORE.with_(layers=18), BEFORE.with_(mlp=920), BEFORE.with_(layers=18, mlp=920),
    BEFORE.with_(vocab=30000),
]  # fmt: skip
PARTS = st.floats(1e-3, 1, allow_nan=False)


def seconds(shape: Shape, outside: float, word: float, block: float, unit: float) -> float:
    """Counted block by block, neuron by neuron's price."""
    total = outside + word * shape["vocab"]
    for _ in range(shape["layers"]):
        total += block + unit * shape["mlp"]
    return total


@settings(max_examples=25, deadline=None)
@given(PARTS, PARTS, PARTS, PARTS)
def test_parts_are_found_again(outside: float, word: float, block: float, unit: float) -> None:
    made = (outside * 1e-2, word * 1e-7, block * 1e-3, unit * 1e-6)
    model = fitted([TimedShape(shape, seconds(shape, *made)) for shape in SHAPES], "mlp")
    assert (model.outside, model.word, model.block, model.unit) == pytest.approx(made, rel=1e-6)
    new = BEFORE.with_(layers=7, mlp=1111, vocab=123)
    assert model.seconds(new) == pytest.approx(seconds(new, *made), rel=1e-6)


def test_words_cost_nothing_of_their_own_where_they_all_stay() -> None:
    made = (5e-3, 1e-7, 1e-3, 1e-6)
    model = fitted([TimedShape(shape, seconds(shape, *made)) for shape in SHAPES[:4]], "mlp")
    assert model.word == 0
    assert model.outside == pytest.approx(5e-3 + 49152e-7, rel=1e-6)


def test_no_part_is_negative_and_none_nearer() -> None:
    """Neurons that seem to pay for themselves cost nothing; against many random parts."""
    times = [1.0, 0.62, 1.03, 0.64]
    model = fitted([TimedShape(s, t) for s, t in zip(SHAPES, times, strict=False)], "mlp")
    parts = (model.outside, model.word, model.block, model.unit)
    assert min(parts) == model.unit == 0

    def error(of: tuple[float, ...]) -> float:
        pairs = zip(SHAPES, times, strict=False)
        return sum((seconds(s, of[0], 0.0, of[2], of[3]) / t - 1) ** 2 for s, t in pairs)

    draws = np.random.default_rng(0).uniform(0, [0.3, 0.05, 3e-5], (10_000, 3))
    terms = [[1, shape["layers"], shape["layers"] * shape["mlp"]] for shape in SHAPES[:4]]
    errors = np.square(draws @ np.transpose(terms) / times - 1).sum(1)
    assert error(parts) <= errors.min()


def test_what_was_timed_last_is_right() -> None:
    model = CostModel("mlp", 1.0, 0.0, 0.1, 1e-3)
    timed = TimedShape(BEFORE.with_(layers=10), 20.0)
    right = model.corrected(timed)
    assert right.seconds(timed.shape) == pytest.approx(20.0)
    again = right.corrected(TimedShape(timed.shape, 10.0))
    assert again.seconds(timed.shape) == pytest.approx(10.0)
