"""A cut worked out once: what it says of every tensor, and cuts one after the other."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from random_tables import layouts, of_size, random_keep, subset
from shearling.errors import ShearlingError
from shearling.table.axes import Axis, Row
from shearling.table.layout import Layout
from shearling.table.values import Indices, Keep, Selection, Shape

NESTED = Layout(
    (
        Axis("layers"),
        Axis("hidden"),
        Axis("heads", per_block=True, inside="groups"),
        Axis("groups", per_block=True),
        Axis("width", rigid=True),
    ),
    (
        Row.of("qkv.{}", "linear", "heads*width + groups*width + groups*width", "hidden"),
        Row.of("out.{}", "linear", "hidden", "heads*width"),
        Row.of("embed", "embedding", "hidden"),
    ),
)


def row_by_row(table: Layout, keep: Keep, shape: Shape) -> list[Selection]:
    """Every dimension of every tensor selected by itself, from a Keep that is complete."""
    layers = keep.model.get("layers", tuple(range(shape["layers"])))
    found = [
        Selection(row.name, row.name, tuple(d.select(keep.model, shape) for d in row.dims), row)
        for row in table.stored
        if not row.in_block
    ]
    for target, source in enumerate(layers):
        kept = {**keep.model} | {axis: blocks[target] for axis, blocks in keep.blocks.items()}
        found += [
            Selection(
                row.name.format(target),
                row.name.format(source),
                tuple(dim.select(kept, shape) for dim in row.dims),
                row,
            )
            for row in table.stored
            if row.in_block
        ]
    return found


def whole(indices: Indices | None, size: int) -> Indices:
    return tuple(range(size)) if indices is None else indices


def after_one_another(first: Keep, second: Keep, shape: Shape) -> Keep:
    """Two complete choices as one: the second counts in what the first has left."""
    model = {
        axis: tuple(
            whole(first.model.get(axis), shape[axis])[i]
            for i in whole(second.model.get(axis), len(whole(first.model.get(axis), shape[axis])))
        )
        for axis in first.model.keys() | second.model.keys()
    }
    depth = len(whole(first.model.get("layers"), shape["layers"]))
    blocks = {}
    for axis in first.blocks.keys() | second.blocks.keys():
        old = first.blocks.get(axis, (tuple(range(shape[axis])),) * depth)
        of = whole(second.model.get("layers"), depth)
        new = second.blocks.get(axis, (tuple(range(len(old[0]))),) * len(of))
        blocks[axis] = tuple(
            tuple(old[block][i] for i in kept) for block, kept in zip(of, new, strict=True)
        )
    return Keep(model, blocks)


def nested_keep(draw: st.DrawFn, shape: Shape) -> Keep:
    """Channels, blocks, groups, and in every group equally many heads: each of them or none."""
    model = {a: subset(draw, shape[a]) for a in ("layers", "hidden") if draw(st.booleans())}
    depth = len(model.get("layers", range(shape["layers"])))
    groups, each = shape["groups"], shape["heads"] // shape["groups"]
    chosen = (tuple(range(groups)),) * depth
    blocks = {}
    if draw(st.booleans()):
        count = draw(st.integers(1, groups))
        chosen = tuple(of_size(draw, groups, count) for _ in range(depth))
        blocks["groups"] = chosen
    if draw(st.booleans()):
        count = draw(st.integers(1, each))
        blocks["heads"] = tuple(
            tuple(g * each + i for g in kept for i in of_size(draw, each, count)) for kept in chosen
        )
    return Keep(model, blocks)


@st.composite
def cases(draw: st.DrawFn):
    """A table, a shape and two choices, one after the other."""
    if draw(st.booleans()):
        table, _, shape, first = draw(layouts())
        return table, shape, first, random_keep(draw, table, table.cut(first, shape).after)
    groups = draw(st.integers(1, 3))
    sizes = {"layers": draw(st.integers(1, 3)), "hidden": draw(st.integers(1, 4)), "width": 2}
    shape = Shape(sizes | {"groups": groups, "heads": groups * draw(st.integers(1, 3))})
    first = nested_keep(draw, shape)
    return NESTED, shape, first, nested_keep(draw, NESTED.cut(first, shape).after)


@given(cases())
@settings(max_examples=100, deadline=None)
def test_a_cut_says_of_every_tensor_what_its_row_says(case) -> None:
    table, shape, keep, _ = case
    cut = table.cut(keep, shape)
    assert cut.keep == table.complete(keep, shape)
    assert list(cut.selections) == row_by_row(table, cut.keep, shape)
    assert cut.before == shape
    sizes = {axis: len(kept) for axis, kept in cut.keep.model.items()}
    sizes |= {axis: len(kept[-1]) for axis, kept in cut.keep.blocks.items()}
    assert cut.after == {**shape} | sizes
    assert table.cut(cut.keep, shape) == cut, "nothing is left to be filled in"
    assert len(cut.layers) == cut.after["layers"]
    assert [cut.by_target[s.target] for s in cut.selections] == list(cut.selections)
    assert [cut.by_source[s.source] for s in cut.selections] == list(cut.selections)


@given(cases())
@settings(max_examples=100, deadline=None)
def test_a_cut_of_a_cut_is_one_cut(case) -> None:
    table, shape, keep, then = case
    first = table.cut(keep, shape)
    second = table.cut(then, first.after)
    once = table.cut(after_one_another(first.keep, second.keep, shape), shape)
    assert once.after == second.after
    sizes, between = table.tensors(shape), table.tensors(first.after)
    assert [s.target for s in once.selections] == [s.target for s in second.selections]
    for selection in second.selections:
        outer = first.by_target[selection.source]
        direct = once.by_target[selection.target]
        assert direct.source == outer.source
        for dim, indices in enumerate(selection.indices):
            old = whole(outer.indices[dim], sizes[outer.source][dim])
            new = whole(indices, between[selection.source][dim])
            found = whole(direct.indices[dim], sizes[direct.source][dim])
            assert found == tuple(old[i] for i in new)


def test_a_cut_is_not_worked_out_again() -> None:
    shape = Shape({"layers": 2, "hidden": 4, "heads": 6, "groups": 3, "width": 2})
    cut = NESTED.cut(Keep({"layers": (1,)}, {"groups": ((0, 2),)}), shape)
    assert NESTED.cut(cut, shape) is cut
    assert cut.layers == (1,)
    assert NESTED.cut(Keep(), shape).layers == (0, 1)
    with pytest.raises(AssertionError, match="is none of"):
        NESTED.cut(cut, cut.after)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cut.after = shape  # ty: ignore[invalid-assignment]
    with pytest.raises(ShearlingError, match="rigid"):
        NESTED.cut(Keep({"width": (0,)}), shape)


def test_what_blocks_share_is_held_once() -> None:
    shape = Shape({"layers": 2, "hidden": 600, "heads": 2, "groups": 1, "width": 2})
    cut = NESTED.cut(Keep({"hidden": tuple(range(500))}, {"heads": ((0,), (1,))}), shape)
    first, second = cut.by_target["out.0"], cut.by_target["out.1"]
    assert first.indices[0] is second.indices[0] is cut.by_target["embed"].indices[0]
    assert (first.indices[1], second.indices[1]) == ((0, 1), (2, 3))
