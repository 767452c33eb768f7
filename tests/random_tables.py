"""Random tables, shapes and things to keep, for tests of the table's algebra."""

from __future__ import annotations

from hypothesis import strategies as st

from shearling.table.axes import Axis, Row
from shearling.table.layout import Layout
from shearling.table.values import Keep, Shape

NAMES = ("a", "b", "c", "d")
SIZES = st.fixed_dictionaries({name: st.integers(1, 5) for name in NAMES})
FACTORS = st.one_of(st.sampled_from(NAMES), st.integers(1, 3))
# Products repeat no axis: none of the table's does, and "a*a" would keep a square.
SEGMENTS = st.lists(FACTORS, min_size=1, max_size=3).filter(
    lambda s: len(names := [f for f in s if isinstance(f, str)]) == len(set(names))
)
FORMULAS = st.lists(SEGMENTS, min_size=1, max_size=4)


def written(formula: list[list[str | int]]) -> str:
    return " + ".join("*".join(map(str, segment)) for segment in formula)


def subset(draw: st.DrawFn, size: int) -> tuple[int, ...]:
    kept = draw(st.sets(st.integers(0, size - 1), min_size=1))
    return tuple(sorted(kept))


def of_size(draw: st.DrawFn, size: int, count: int) -> tuple[int, ...]:
    kept = draw(st.sets(st.integers(0, size - 1), min_size=count, max_size=count))
    return tuple(sorted(kept))


MODEL_AXES, BLOCK_AXES = ("a", "b"), ("c", "d")
# What lies outside the blocks has no business with the axes of single blocks.
OUTSIDE = FORMULAS.filter(lambda dim: not {f for s in dim for f in s} & set(BLOCK_AXES))


def random_keep(draw: st.DrawFn, table: Layout, shape: Shape) -> Keep:
    """Something to keep of a table without nested axes: units at random, of some axes."""
    axes = [axis for axis in table.axes if not axis.rigid and draw(st.booleans())]
    model = {axis.name: subset(draw, shape[axis.name]) for axis in axes if not axis.per_block}
    depth = len(model.get("layers", range(shape["layers"])))
    blocks = {}
    for axis in axes:
        if axis.per_block:
            size = shape[axis.name]
            count = draw(st.integers(1, size))
            blocks[axis.name] = tuple(of_size(draw, size, count) for _ in range(depth))
    return Keep(model, blocks)


@st.composite
def layouts(draw: st.DrawFn):
    """A random table, a shape and something to keep: a, b of the model; c, d of every block."""
    rows: dict[str, list[list[list[str | int]]]] = {}
    for number in range(draw(st.integers(1, 4))):
        in_block = draw(st.booleans())
        formulas = FORMULAS if in_block else OUTSIDE
        name = f"block.{{}}.{number}" if in_block else f"outside.{number}"
        rows[name] = draw(st.lists(formulas, min_size=1, max_size=2))
    used = {
        f for dims in rows.values() for dim in dims for s in dim for f in s if isinstance(f, str)
    }
    axes = [Axis("layers")] + [
        Axis(name, per_block=name in BLOCK_AXES) for name in NAMES if name in used
    ]
    table = Layout(
        tuple(axes),
        tuple(Row.of(name, "linear", *map(written, dims)) for name, dims in rows.items()),
    )
    shape = Shape(draw(SIZES) | {"layers": draw(st.integers(1, 4))})
    return table, rows, shape, random_keep(draw, table, shape)
