"""From scores of units to the units that stay, block by block and group by group."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from places import place
from shearling.engine.stream import BlockStream
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.choose import group_sums, keep_units
from shearling.scoring.score_units import score_units
from shearling.scoring.scores import Scores
from shearling.scoring.units.places import unit_axes
from shearling.table.families.base import gated_decoder
from shearling.table.values import Shape

Models = Callable[[str], Path]
LAYOUT = gated_decoder(SimpleNamespace(tie_word_embeddings=False))
SMOL = Shape(
    {"layers": 3, "hidden": 7, "vocab": 11, "heads": 9, "kv_heads": 3, "head_dim": 2, "mlp": 5}
)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Shape, Shape, tuple[int, ...], dict[str, Scores]]:
    """A geometry, a smaller one, blocks that survive, and scores with many ties."""
    layers, kv, each = draw(st.tuples(*[st.integers(1, 4)] * 3))
    before = Shape(
        {"layers": layers, "vocab": 11, "head_dim": 2, "heads": kv * each, "kv_heads": kv}
        | {"mlp": draw(st.integers(1, 9)), "hidden": draw(st.integers(1, 9))}
    )
    chosen = tuple(sorted(draw(st.sets(st.integers(0, layers - 1), min_size=1))))
    fewer = draw(st.integers(1, kv))
    after = before.with_(
        layers=len(chosen),
        kv_heads=fewer,
        heads=fewer * draw(st.integers(1, each)),
        mlp=draw(st.integers(1, before["mlp"])),
        hidden=draw(st.integers(1, before["hidden"])),
    )
    axes = draw(st.sampled_from([("kv_heads", "heads"), ("heads",)]))
    scores = {}
    for axis in ("mlp", "hidden", *axes):
        row = st.tuples(*[st.integers(0, 3).map(float)] * before[axis])
        rows = draw(st.tuples(*[row] * (1 if axis == "hidden" else layers)))
        scores[axis] = Scores("any", axis, rows)
    return before, after, chosen, scores


def best(row: tuple[float, ...], among: list[int], count: int) -> list[int]:
    left = list(among)
    while len(left) > count:  # the last of the lowest goes first
        lowest = min(row[i] for i in left)
        left.remove(max(i for i in left if row[i] == lowest))
    return left


@settings(max_examples=60, deadline=None)
@given(cut=cuts())
def test_the_highest_stay(cut: tuple[Shape, Shape, tuple[int, ...], dict[str, Scores]]) -> None:
    before, after, chosen, scores = cut
    keep = keep_units(scores, LAYOUT, before, after, chosen)
    assert LAYOUT.complete(keep, before) == keep
    assert LAYOUT.cut(keep, before).after == after
    each, fewer = before["heads"] // before["kv_heads"], after["heads"] // after["kv_heads"]
    (row,) = scores["hidden"].rows
    hidden = best(row, list(range(before["hidden"])), after["hidden"])
    assert keep.model.get("hidden", tuple(range(before["hidden"]))) == tuple(hidden)
    assert keep.model.get("layers", tuple(range(before["layers"]))) == chosen
    for at, block in enumerate(chosen):
        if after["mlp"] < before["mlp"]:
            row = scores["mlp"].rows[block]
            neurons = best(row, list(range(before["mlp"])), after["mlp"])
            assert list(keep.blocks["mlp"][at]) == neurons
        heads = scores["heads"].rows[block]
        groups = [sum(heads[g * each : (g + 1) * each]) for g in range(before["kv_heads"])]
        if "kv_heads" in scores:
            groups = list(scores["kv_heads"].rows[block])
        kept = best(tuple(groups), list(range(before["kv_heads"])), after["kv_heads"])
        inside = [
            h for g in kept for h in best(heads, list(range(g * each, g * each + each)), fewer)
        ]
        if after["kv_heads"] < before["kv_heads"]:
            assert list(keep.blocks["kv_heads"][at]) == kept
        if after["heads"] < before["heads"]:
            assert list(keep.blocks["heads"][at]) == inside


def test_axes_that_stay_need_no_scores() -> None:
    keep = keep_units({}, LAYOUT, SMOL, SMOL.with_(vocab=5), (0, 1, 2))
    assert keep.as_json() == {}
    assert keep_units({}, LAYOUT, SMOL, SMOL.with_(layers=2), (0, 2)).as_json() == {
        "layers": [0, 2]
    }
    whole_groups = Scores("any", "kv_heads", ((0.0, 2.0, 1.0),) * 3)
    after = SMOL.with_(kv_heads=2, heads=6)
    keep = keep_units({"kv_heads": whole_groups}, LAYOUT, SMOL, after, (0, 1, 2))
    assert keep.blocks["heads"] == ((3, 4, 5, 6, 7, 8),) * 3


def test_a_scored_model_can_be_chosen_from(models: Models, ids: Tensor, variant: str) -> None:
    checkpoint = Checkpoint.open(models(variant))
    layout, shape = checkpoint.layout, checkpoint.shape
    axes = unit_axes(layout)
    scores = score_units(BlockStream(checkpoint, place()), "magnitude-l2", ids, axes)
    after = shape.with_(layers=3, mlp=21, heads=6, hidden=30)
    after = after.with_(kv_heads=2) if "kv_heads" in axes else after
    keep = keep_units(scores, layout, shape, after, (0, 2, 4))
    assert layout.cut(keep, shape).after == after


@pytest.mark.parametrize(
    ("scores", "sizes", "layers", "message"),
    [
        ({}, {"mlp": 4}, (0, 1, 2), "mlp is to shrink, but there are no scores of mlp"),
        ({}, {"kv_heads": 2, "heads": 6}, (0, 1, 2), "no scores of kv_heads"),
        ({}, {"heads": 6}, (0, 1, 2), "no scores of heads"),
        ({}, {"heads": 7}, (0, 1, 2), "heads=7 cannot be spread evenly"),
        ({}, {"kv_heads": 2, "heads": 8}, (0, 1, 2), "would put 4 in each, .* at most 6"),
        ({}, {"mlp": 6}, (0, 1, 2), "mlp=6 was asked for, but the model has only 5"),
        ({}, {"mlp": 0}, (0, 1, 2), "mlp must be at least 1"),
        ({}, {}, (0, 1), "2 surviving blocks were named, but layers=3"),
        ({}, {"layers": 2}, (1, 0), "layers must be increasing"),
        ({}, {"layers": 2}, (1, 3), "layers must be increasing and lie in 0..2"),
        ({"mlp": ((1.0,) * 5,) * 2}, {"mlp": 4}, (0, 1, 2), "2 x 5 units of mlp, .* has 3 x 5"),
        ({"hidden": ((1.0,) * 7,) * 3}, {"hidden": 4}, (0, 1, 2), "3 x 7 units .* has 1 x 7"),
        ({"mlp": ((1.0,) * 9,) * 3}, {"mlp": 4}, (0, 1, 2), "3 x 9 units of mlp"),
    ],
)
def test_what_cannot_be_chosen_is_said(
    scores: dict[str, Any], sizes: dict[str, int], layers: tuple[int, ...], message: str
) -> None:
    given_scores = {axis: Scores("any", axis, rows) for axis, rows in scores.items()}
    with pytest.raises(ShearlingError, match=message):
        keep_units(given_scores, LAYOUT, SMOL, SMOL.with_(**sizes), layers)


def test_group_sums() -> None:
    assert group_sums((1.0, 2.0, 3.0, 4.0, 5.0, 6.0), 2) == (6.0, 15.0)
