"""Damage curves are the perplexities of whole models without those blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

import naive
from places import place
from shearling.engine.stream import BlockStream
from shearling.evaluate.damage import damage
from shearling.model.checkpoint import Checkpoint

Models = Callable[[str], Path]


@pytest.fixture
def llama(models: Models) -> Path:
    return models("llama")


def test_every_point_is_the_naive_perplexity(llama: Path, ids: Tensor) -> None:
    stream = BlockStream(Checkpoint.open(llama), place(False))
    orders = {"perplexity": (3, 1, 0, 4), "taylor": (1, 3, 2), "magnitude": (4, 2, 0, 1)}
    stages = set()
    curves = damage(
        stream, ids, orders, [0, 2, 3], progress=lambda stage, done, total: stages.add(stage)
    )
    assert [curve.criterion for curve in curves] == list(orders)
    assert stages == {"measuring damage curves"}
    for curve in curves:
        order = orders[curve.criterion]
        assert curve.removed == ((), order[:2], order[:3])
        expected = [naive.perplexity(llama, ids, removed) for removed in curve.removed]
        assert curve.perplexity == pytest.approx(expected, rel=1e-5)
    # The same blocks in another order are the same model.
    assert curves[0].perplexity[:2] == curves[1].perplexity[:2]


def test_counts_beyond_an_order_are_left_out(llama: Path, ids: Tensor) -> None:
    stream = BlockStream(Checkpoint.open(llama), place(True))
    short, empty, whole = damage(
        stream, ids, {"short": (2, 1), "empty": (), "whole": (0, 1, 2, 3, 4)}, [0, 1, 2, 3, 5, 9]
    )
    assert short.removed == ((), (2,), (2, 1))
    assert empty.removed == ((),)
    assert whole.removed == ((), (0,), (0, 1), (0, 1, 2), (0, 1, 2, 3, 4))
    assert all(len(curve.removed) == len(curve.perplexity) for curve in (short, empty, whole))
    expected = [naive.perplexity(llama, ids, removed) for removed in whole.removed]
    assert whole.perplexity == pytest.approx(expected, rel=1e-5)


def test_a_broken_model_gives_a_finite_point(
    llama: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shearling.evaluate.damage as module

    monkeypatch.setattr(module, "removal_nll", lambda *_, **__: [5000.0])
    stream = BlockStream(Checkpoint.open(llama), place(True))
    (curve,) = damage(stream, ids, {"any": ()}, [0])
    assert 1e300 < curve.perplexity[0] < float("inf")
