"""From scores, or a list, to the blocks that stay."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shearling.errors import ShearlingError
from shearling.pruning.choose import account, check_layers, keep_layers, without
from shearling.scoring.scores import Scores
from shearling.table.values import Keep


def scores(*values: float, protected: tuple[int, ...] = (), order: tuple[int, ...] = ()) -> Scores:
    return Scores("perplexity", "layers", (values,), protected, order, details={"calibration": "c"})


def kept(keep: Keep) -> tuple[int, ...]:
    assert keep.blocks == {}
    assert set(keep.model) == {"layers"}
    return keep.model["layers"]


@pytest.mark.parametrize(
    ("layers", "expected"), [(4, (0, 1, 2, 4)), (3, (1, 2, 4)), (2, (1, 4)), (1, (4,))]
)
def test_the_lowest_scores_go_first(layers: int, expected: tuple[int, ...]) -> None:
    assert kept(keep_layers(scores(2.0, 4.0, 3.0, -1.0, 5.0), layers)) == expected


def test_ties_go_to_the_lower_index() -> None:
    assert kept(keep_layers(scores(1, 0, 1, 0, 0), 4)) == (0, 2, 3, 4)
    assert kept(keep_layers(scores(1, 0, 1, 0, 0), 3)) == (0, 2, 4)
    assert kept(keep_layers(scores(1, 0, 1, 0, 0), 1)) == (2,)


def test_protected_blocks_stay_however_low_their_scores() -> None:
    assert kept(keep_layers(scores(0, 5, 4, 3, 0, protected=(0, 4)), 3)) == (0, 1, 4)
    assert kept(keep_layers(scores(0, 5, 4, 3, 0, protected=(0, 4)), 2)) == (0, 4)


def test_more_than_the_unprotected_cannot_go() -> None:
    with pytest.raises(
        ShearlingError, match=r"remove 4 of 5 blocks, but only 3 .* keep at least 2"
    ):
        keep_layers(scores(0, 5, 4, 3, 0, protected=(0, 4)), 1)


def test_an_order_of_removal_takes_precedence() -> None:
    found = scores(0, 1, 2, 3, 4, order=(4, 2))
    assert kept(keep_layers(found, 4)) == (0, 1, 2, 3)
    assert kept(keep_layers(found, 3)) == (0, 1, 3)
    # Beyond the order, scores decide again.
    assert kept(keep_layers(found, 2)) == (1, 3)


@given(st.data())
def test_against_removing_one_at_a_time(data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, 3), min_size=2, max_size=8))
    depth = len(values)
    protected = data.draw(st.sets(st.integers(0, depth - 1), max_size=depth - 1))
    layers = data.draw(st.integers(max(1, len(protected)), depth - 1))
    left = list(range(depth))
    while len(left) > layers:
        lowest = min(values[i] for i in left if i not in protected)
        left.remove(next(i for i in left if i not in protected and values[i] == lowest))
    found = keep_layers(scores(*values, protected=tuple(protected)), layers)
    assert kept(found) == tuple(left)


@pytest.mark.parametrize("layers", [0, -1, 5, 6])
def test_impossible_numbers_of_blocks(layers: int) -> None:
    for attempt in (lambda: keep_layers(scores(1, 2, 3, 4, 5), layers), lambda: check(layers)):
        with pytest.raises(ShearlingError) as error:
            attempt()
        assert str(error.value) == (
            f"--layers {layers} was given, but the model has 5 blocks; keep between 1 and 4."
        )


def check(layers: int) -> None:
    check_layers(layers, 5)


def test_possible_numbers_of_blocks() -> None:
    for layers in (1, 2, 3, 4):
        check(layers)


@pytest.mark.parametrize(
    ("removed", "expected"),
    [((0,), (1, 2, 3, 4)), ((3, 0), (1, 2, 4)), ((4, 2, 1, 0), (3,)), ([1, 2], (0, 3, 4))],
)
def test_a_list_of_blocks_to_remove(removed, expected: tuple[int, ...]) -> None:
    assert kept(without(removed, 5)) == expected
    assert kept(without(iter(removed), 5)) == expected


@pytest.mark.parametrize(
    ("removed", "sentence"),
    [
        ((5,), "--remove 5 was given, but the model's blocks are numbered 0 to 4"),
        ((1, -1), "--remove 1,-1 was given, but the model's blocks are numbered 0 to 4"),
        ((2, 1, 2), "--remove 2,1,2 names a block twice"),
        ((), "0 of 5 blocks were named for removal; name between 1 and 4"),
        ((4, 3, 2, 1, 0), "5 of 5 blocks were named for removal; name between 1 and 4"),
    ],
)
def test_impossible_lists(removed: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(ShearlingError) as error:
        without(removed, 5)
    assert str(error.value) == f"{sentence}."


def test_the_account_of_a_choice() -> None:
    found = scores(2.0, 4.0, 3.0, -1.0, 5.0)
    assert account(keep_layers(found, 3), 5, found) == {
        "layers": 3,
        "removed": [0, 3],
        "criterion": "perplexity",
        "scores": [2.0, 4.0, 3.0, -1.0, 5.0],
        "calibration": "c",
    }
    named = account(without((2,), 5), 5)
    assert (named["removed"], named["layers"]) == ([2], 4)
    assert named["criterion"] is named["scores"] is named["calibration"] is None
