"""The table's algebra, against index arrays cut by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from random_tables import FORMULAS, NAMES, SIZES, layouts, subset, written
from shearling.errors import ShearlingError
from shearling.table.axes import Axis, Dim, Row
from shearling.table.layout import Layout
from shearling.table.values import Keep, Shape


def naive_select(
    formula: list[list[str | int]], kept: dict[str, tuple[int, ...]], sizes: dict[str, int]
) -> list[int]:
    """Cut the numbers of a whole dimension as one would cut a tensor: split, reshape, take."""
    factors = [[sizes[f] if isinstance(f, str) else f for f in segment] for segment in formula]
    totals = [math.prod(each) for each in factors]
    parts = np.split(np.arange(sum(totals)), np.cumsum(totals)[:-1])
    out = []
    for segment, each, part in zip(formula, factors, parts, strict=True):
        array = part.reshape(each)
        for position, factor in enumerate(segment):
            if factor in kept:
                array = np.take(array, kept[factor], axis=position)
        out.append(array.reshape(-1))
    return np.concatenate(out).tolist()


@st.composite
def dims(draw: st.DrawFn):
    sizes = draw(SIZES)
    axes = draw(st.sets(st.sampled_from(NAMES)))
    return draw(FORMULAS), {axis: subset(draw, sizes[axis]) for axis in sorted(axes)}, sizes


@given(dims())
@settings(max_examples=200, deadline=None)
def test_select_equals_cutting_an_index_array(case) -> None:
    formula, kept, sizes = case
    dim = Dim.parse(written(formula))
    found = dim.select(kept, Shape(sizes))
    expected = naive_select(formula, kept, sizes)
    if found is None:
        assert expected == list(range(dim.size(Shape(sizes))))
    else:
        assert list(found) == expected
        assert all(a < b for a, b in pairwise(found)), "the source's order is kept"


@given(dims())
@settings(max_examples=100, deadline=None)
def test_the_size_after_is_the_number_selected(case) -> None:
    formula, kept, sizes = case
    dim = Dim.parse(written(formula))
    found = dim.select(kept, Shape(sizes))
    after = Shape(sizes).with_(**{axis: len(indices) for axis, indices in kept.items()})
    assert dim.size(after) == (dim.size(Shape(sizes)) if found is None else len(found))


@given(FORMULAS, SIZES)
@settings(max_examples=50, deadline=None)
def test_keeping_everything_is_the_identity(formula, sizes) -> None:
    dim, shape = Dim.parse(written(formula)), Shape(sizes)
    assert dim.select({}, shape) is None
    everything = {axis: tuple(range(size)) for axis, size in sizes.items()}
    assert dim.select(everything, shape) in (None, tuple(range(dim.size(shape))))


def test_a_formula_is_read_with_or_without_blanks() -> None:
    assert Dim.parse("a*2+b") == Dim.parse(" a * 2 + b ") == Dim((("a", 2), ("b",)))
    assert Dim.parse("a*2+b").axes == {"a", "b"}


def test_interleaving_and_fusing_are_told_apart() -> None:
    """The two ways to put queries, keys and values of two heads of width 2 in one tensor."""
    shape = Shape({"heads": 2, "width": 2})
    kept = {"heads": (1,)}
    fused = Dim.parse("heads*width + heads*width + heads*width")
    assert fused.select(kept, shape) == (2, 3, 6, 7, 10, 11)
    assert Dim.parse("heads*3*width").select(kept, shape) == (6, 7, 8, 9, 10, 11)


# --- whole layouts -------------------------------------------------------------------------------


@given(layouts())
@settings(max_examples=150, deadline=None)
def test_every_tensor_of_a_cut_is_what_a_cut_by_hand_gives(case) -> None:
    table, formulas, shape, keep = case
    kept_layers = keep.model.get("layers", tuple(range(shape["layers"])))
    found = list(table.cut(keep, shape).selections)
    expected = {name: (name, keep.model) for name in formulas if "{}" not in name} | {
        name.format(target): (
            name.format(source),
            {**keep.model, **{axis: each[target] for axis, each in keep.blocks.items()}},
        )
        for name in formulas
        if "{}" in name
        for target, source in enumerate(kept_layers)
    }
    assert {s.target: s.source for s in found} == {t: s for t, (s, _) in expected.items()}
    assert len(found) == len(expected), "no tensor is given twice"
    rows = {
        name.format(i): dims
        for name, dims in formulas.items()
        for i in range(shape["layers"])  # a name without {} is its own format
    }
    sizes = table.tensors(shape)
    for selection in found:
        kept = expected[selection.target][1]
        for dim, indices, size in zip(
            rows[selection.source], selection.indices, sizes[selection.source], strict=True
        ):
            whole = tuple(range(size)) if indices is None else indices
            assert list(whole) == naive_select(dim, dict(kept), dict(shape))


@given(layouts())
@settings(max_examples=100, deadline=None)
def test_counts_and_shapes_after_a_cut_are_those_of_what_is_selected(case) -> None:
    table, _, shape, keep = case
    after, before = table.cut(keep, shape).after, table.tensors(shape)
    selected = {
        s.target: tuple(
            size if indices is None else len(indices)
            for indices, size in zip(s.indices, before[s.source], strict=True)
        )
        for s in table.cut(keep, shape).selections
    }
    assert selected == table.tensors(after)
    assert sum(map(math.prod, selected.values())) == table.count(after)
    in_blocks = sum(math.prod(s) for name, s in selected.items() if name.startswith("block."))
    assert table.count_block(after) * after["layers"] == in_blocks


@given(layouts())
@settings(max_examples=50, deadline=None)
def test_a_keep_of_nothing_changes_nothing(case) -> None:
    table, _, shape, _ = case
    assert table.cut(Keep(), shape).after == shape
    for selection in table.cut(Keep(), shape).selections:
        assert selection.target == selection.source
        assert set(selection.indices) == {None}


# --- heads in groups -----------------------------------------------------------------------------

GROUPED = Layout(
    (
        Axis("layers"),
        Axis("hidden"),
        Axis("heads", per_block=True, inside="groups"),
        Axis("groups", per_block=True),
        Axis("width", rigid=True),
    ),
    (
        Row.of("q.{}", "linear", "heads*width", "hidden"),
        Row.of("k.{}", "linear", "groups*width", "hidden"),
        Row.of("embed", "embedding", "hidden"),
    ),
)
NINE = Shape({"layers": 2, "hidden": 4, "heads": 9, "groups": 3, "width": 2})
ONE = NINE.with_(layers=1)


def test_heads_follow_their_groups() -> None:
    keep = GROUPED.complete(Keep(blocks={"groups": ((0, 2), (1, 2))}), NINE)
    assert keep.blocks["heads"] == ((0, 1, 2, 6, 7, 8), (3, 4, 5, 6, 7, 8))
    after = GROUPED.cut(Keep(blocks={"groups": ((0, 2), (1, 2))}), NINE).after
    assert (after["groups"], after["heads"]) == (2, 6)


def test_heads_alone_keep_all_groups() -> None:
    given_ = Keep(blocks={"heads": ((0, 2, 3, 4, 7, 8), (1, 2, 3, 5, 6, 7))})
    keep = GROUPED.complete(given_, NINE)
    assert keep.blocks["heads"] == given_.blocks["heads"]
    after = GROUPED.cut(given_, NINE).after
    assert (after["groups"], after["heads"]) == (3, 6)
    selected = {s.target: s.indices for s in GROUPED.cut(given_, NINE).selections}
    assert selected["q.0"][0] == (0, 1, 4, 5, 6, 7, 8, 9, 14, 15, 16, 17)
    assert selected["k.0"] == (None, None)


def test_heads_and_groups_together() -> None:
    keep = Keep(blocks={"groups": ((0, 2),), "heads": ((1, 2, 6, 8),)})
    after = GROUPED.cut(keep, ONE).after
    assert (after["groups"], after["heads"]) == (2, 4)
    selected = {s.target: s.indices for s in GROUPED.cut(keep, ONE).selections}
    assert selected["q.0"][0] == (2, 3, 4, 5, 12, 13, 16, 17)
    assert selected["k.0"][0] == (0, 1, 4, 5)


@pytest.mark.parametrize(
    "blocks",
    [
        {"heads": ((0, 1, 3),)},  # two of the first group, one of the second, none of the third
        {"heads": ((0, 1, 3, 6),)},
        {"heads": ((0, 3),)},  # the third group is kept, and empty
        {"groups": ((0, 1),), "heads": ((0, 3, 6),)},  # a head of a group that is gone
        {"groups": ((0, 1),), "heads": ((0, 1, 2),)},
        {"groups": ((0, 1),), "heads": ((0, 1, 3),)},
    ],
)
def test_unequal_groups_are_refused(blocks) -> None:
    with pytest.raises(ShearlingError, match="equally many of heads") as error:
        GROUPED.complete(Keep(blocks=blocks), ONE)
    assert str(list(blocks["heads"][0])) in str(error.value)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_nesting_against_a_loop_over_groups(data) -> None:
    groups, each = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    shape = NINE.with_(layers=1, heads=groups * each, groups=groups)
    kept = data.draw(st.sets(st.integers(0, groups - 1), min_size=1))
    heads = data.draw(st.sets(st.integers(0, groups * each - 1), min_size=1))
    counts = {g: len([h for h in heads if g * each <= h < (g + 1) * each]) for g in range(groups)}
    legal = {counts[g] for g in kept} == {len(heads) // len(kept)} and not any(
        counts[g] for g in range(groups) if g not in kept
    )
    keep = Keep(blocks={"groups": (tuple(sorted(kept)),), "heads": (tuple(sorted(heads)),)})
    if legal:
        after = GROUPED.cut(keep, shape).after
        assert (after["heads"], after["groups"]) == (len(heads), len(kept))
        GROUPED.check(after)
    else:
        with pytest.raises(ShearlingError, match="equally many of heads"):
            GROUPED.complete(keep, shape)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "indices", [(-1, 0), (0, 4), (4,), (1, 0), (0, 0), (2, 1, 3)], ids=lambda i: str(list(i))
)
def test_indices_out_of_range_or_order(indices) -> None:
    with pytest.raises(ShearlingError, match="hidden must be increasing and lie in 0..3") as error:
        GROUPED.complete(Keep({"hidden": indices}), NINE)
    assert str(list(indices)) in str(error.value)
    bad = tuple(i * 9 for i in indices) if 4 in indices else indices
    with pytest.raises(ShearlingError, match="heads must be increasing and lie in 0..8"):
        GROUPED.complete(Keep(blocks={"heads": (bad,)}), ONE)


def test_nothing_left_of_an_axis() -> None:
    with pytest.raises(ShearlingError, match="nothing would be left of hidden"):
        GROUPED.complete(Keep({"hidden": ()}), NINE)
    with pytest.raises(ShearlingError, match="nothing would be left of layers"):
        GROUPED.complete(Keep({"layers": ()}), NINE)
    with pytest.raises(ShearlingError, match="nothing would be left of groups"):
        GROUPED.complete(Keep(blocks={"groups": ((),)}), ONE)


def test_an_unknown_axis_names_those_there_are() -> None:
    with pytest.raises(ShearlingError, match=r"'experts' is not one .*layers, hidden, heads"):
        GROUPED.complete(Keep({"experts": (0,)}), NINE)
    with pytest.raises(ShearlingError, match="'experts' is not one"):
        GROUPED.complete(Keep(blocks={"experts": ((0,),)}), ONE)


def test_a_rigid_axis_cannot_be_cut() -> None:
    with pytest.raises(ShearlingError, match="'width' is rigid"):
        GROUPED.complete(Keep({"width": (0,)}), NINE)


@pytest.mark.parametrize(
    "blocks",
    [((0, 1, 2),), ((0, 1, 2), (0, 1, 2), (0, 1, 2)), ((0, 1, 2), (0, 3))],
    ids=["one block of two", "three blocks of two", "unequal"],
)
def test_every_surviving_block_keeps_equally_many(blocks) -> None:
    with pytest.raises(ShearlingError, match=r"groups must keep equally many .* 2 surviving"):
        GROUPED.complete(Keep(blocks={"groups": blocks}), NINE)


def test_blocks_are_counted_after_layers_are_removed() -> None:
    keep = Keep({"layers": (1,)}, {"groups": ((0, 2),)})
    sources = {s.target: s.source for s in GROUPED.cut(keep, NINE).selections}
    assert sources == {"embed": "embed", "q.0": "q.1", "k.0": "k.1"}
    with pytest.raises(ShearlingError, match="1 surviving"):
        GROUPED.complete(Keep({"layers": (1,)}, {"groups": ((0,), (1,))}), NINE)


def test_an_axis_in_the_wrong_half_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="wrong half"):
        GROUPED.complete(Keep({"groups": (0,)}), NINE)
    with pytest.raises(AssertionError, match="wrong half"):
        GROUPED.complete(Keep(blocks={"hidden": ((0,), (0,))}), NINE)


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"hidden": 0}, "hidden=0, but hidden must be at least 1"),
        ({"layers": -1}, "layers=-1, but layers must be at least 1"),
        ({"heads": 8}, "heads=8 cannot be spread evenly over groups=3"),
        ({"heads": 2}, "heads=2 cannot be spread evenly over groups=3"),
    ],
)
def test_impossible_shapes(sizes, sentence) -> None:
    with pytest.raises(ShearlingError, match=sentence):
        GROUPED.check(NINE.with_(**sizes))


def test_a_shape_without_an_axis() -> None:
    with pytest.raises(ShearlingError, match="hidden=None"):
        GROUPED.check(Shape({"layers": 1}))
    GROUPED.check(NINE)


# --- the table itself ----------------------------------------------------------------------------


def test_undeclared_and_unused_axes_fail_to_load() -> None:
    layers, a, b = Axis("layers"), Axis("a"), Axis("b")
    with pytest.raises(AssertionError, match="axes used"):
        Layout((layers, a), (Row.of("x", "linear", "a", "b"),))
    with pytest.raises(AssertionError, match="axes used"):
        Layout((layers, a, b), (Row.of("x", "linear", "a"),))
    with pytest.raises(AssertionError, match="axes used"):
        Layout((a,), (Row.of("x", "linear", "a"),))


def test_a_row_tied_to_nothing_fails_to_load() -> None:
    axes = (Axis("layers"), Axis("a"))
    with pytest.raises(AssertionError):
        Layout(axes, (Row.of("x", "linear", "a"), Row.of("y", "head", "a", tied_to="z")))
    with pytest.raises(AssertionError):  # a chain: z shares y's storage, which y does not have
        Layout(
            axes,
            (
                Row.of("x", "embedding", "a"),
                Row.of("y", "head", "a", tied_to="x"),
                Row.of("z", "head", "a", tied_to="y"),
            ),
        )


def test_a_tied_row_is_neither_counted_nor_cut() -> None:
    rows = (Row.of("x", "embedding", "a", "b"), Row.of("y", "head", "a", "b", tied_to="x"))
    axes = (Axis("layers"), Axis("a"), Axis("b"))
    shape = Shape({"layers": 3, "a": 5, "b": 7})
    tied = Layout(axes, rows)
    assert tied.count(shape) == 35
    assert tied.tensors(shape) == {"x": (5, 7)}
    assert [s.target for s in tied.cut(Keep({"b": (0, 6)}), shape).selections] == ["x"]
    free = Layout(axes, (rows[0], Row.of("y", "head", "a", "b")))
    assert free.count(shape) == 70


def test_shapes_are_values() -> None:
    sizes = {"layers": 2, "hidden": 4}
    shape = Shape(sizes)
    sizes["hidden"] = 5
    assert shape["hidden"] == 4
    assert shape.with_(hidden=3) == {"layers": 2, "hidden": 3}
    assert shape["hidden"] == 4
    assert hash(shape) == hash(Shape({"hidden": 4, "layers": 2}))
    assert repr(shape) == "layers=2, hidden=4"
    assert len(shape) == 2


def test_a_keep_as_json() -> None:
    keep = Keep({"layers": (0, 2)}, {"mlp": ((1,), (3,))})
    assert keep.as_json() == {"layers": [0, 2], "mlp": [[1], [3]]}


def test_a_norm_without_parameters_is_neither_counted_nor_cut() -> None:
    rows = (Row.of("x", "embedding", "a", "b"), Row.of("n.{}.weight", "norm", "b", bare=True))
    table = Layout((Axis("layers"), Axis("a"), Axis("b")), rows)
    shape = Shape({"layers": 3, "a": 5, "b": 7})
    assert table.count(shape) == 35
    assert table.count_block(shape) == 0
    assert table.tensors(shape) == {"x": (5, 7)}
    assert [s.target for s in table.cut(Keep({"b": (0,)}), shape).selections] == ["x"]
    with pytest.raises(AssertionError):  # nothing is stored that another could share
        Layout(table.axes, (*rows, Row.of("y", "norm", "b", tied_to="n.{}.weight")))


def test_where_the_output_of_a_row_lies() -> None:
    for role, formulas, axis in (
        ("linear", ("a", "b"), "a"),
        ("head", ("a", "b"), "a"),
        ("embedding", ("a", "b"), "b"),
        ("bias", ("a",), "a"),
        ("norm", ("b",), "b"),
    ):
        assert Row.of("x", role, *formulas).output == Dim.parse(axis)


def test_a_selection_names_the_row_it_comes_from() -> None:
    keep = Keep({"layers": (1,)}, {"groups": ((0, 2),)})
    rows = {s.target: s.row.name for s in GROUPED.cut(keep, NINE).selections}
    assert rows == {"embed": "embed", "q.0": "q.{}", "k.0": "k.{}"}
