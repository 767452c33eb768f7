"""The search is optimal: against every shape of a small grid."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shearling.errors import ShearlingError
from shearling.pruning.plan import Spending, shape_for
from shearling.pruning.preferences import PREFERENCES
from shearling.table.families import FAMILIES
from shearling.table.values import Shape
from shearling.targets.search import Limit, SearchSpace, search
from tiny_models import tiny_config

STEPS = [32, 40, 48, 50]  # at least half of 50 neurons, in eights


@cache
def headed(variant: str) -> Any:
    """What a search looks at of a checkpoint, without one."""
    config = tiny_config(variant)
    family = FAMILIES[config.model_type]
    layout, shape = family.layout(config), family.shape(config)
    return SimpleNamespace(
        config=config, family=family, layout=layout, shape=shape, name=variant,
        parameters=layout.count(shape),
    )  # fmt: skip


def limit(of: Callable[[Shape], float], most: float, name: str = "--speed") -> Limit:
    return Limit(name, "1x", most, of, lambda cost, more: f"{cost:.{3 + more}f}")


def time(block: float, unit: float) -> Callable[[Shape], float]:
    return lambda shape: 1 + shape["layers"] * (block + unit * shape["mlp"])


def damage(source: Any, shape: Shape, share: float) -> tuple[float, float]:
    """Counted on the tensors that go, with the shares of blocks and of neurons named."""
    whole = source.layout.count(source.shape)
    blocks = whole - source.layout.count(source.shape.with_(layers=shape["layers"]))
    neurons = whole - blocks - source.layout.count(shape)
    b, n = blocks / whole, neurons / whole
    return round((1 - share) * b * b + share * n * n, 15), round(b + n, 15)


@pytest.mark.parametrize("variant", ["llama", "gpt_neox", "opt"])
@pytest.mark.parametrize("prefer", PREFERENCES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_no_shape_within_the_limits_promises_less_damage(
    variant: str, prefer: str, data: st.DataObject
) -> None:
    source = headed(variant)
    seconds = time(data.draw(st.floats(0, 1)), data.draw(st.floats(0, 0.1)))
    reach = seconds(source.shape) * data.draw(st.floats(0.1, 1))
    params = source.parameters * data.draw(st.floats(0.3, 1))
    limits = [limit(seconds, reach), limit(source.layout.count, params, "--params")]
    every = [source.shape.with_(layers=layers, mlp=mlp) for layers in range(1, 6) for mlp in STEPS]
    fitting = [s for s in every if seconds(s) <= reach and source.layout.count(s) <= params]
    space = SearchSpace(source, "mlp", Spending(prefer))
    if not fitting:
        with pytest.raises(ShearlingError, match="cannot be met.*nearest"):
            search(space, limits)
        return
    share = PREFERENCES[prefer].blocks_give
    least = min(damage(source, shape, share) for shape in fitting)
    assert damage(source, search(space, limits), share) == pytest.approx(least)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.55, 0.98))
def test_a_budget_alone_gives_blocks_about_their_share(kept: float) -> None:
    """A search within parameters alone is next to what ``--params`` takes."""
    source = headed("llama")
    most = int(source.parameters * kept)
    shape = search(SearchSpace(source, "mlp", Spending()), [limit(source.layout.count, most)])
    assert abs(shape["layers"] - shape_for(source, most)["layers"]) <= 1


def test_axes_that_must_stay_do() -> None:
    source = headed("llama")
    most = source.parameters * 0.9
    for axis, other in (("layers", "mlp"), ("mlp", "layers")):
        space = SearchSpace(source, "mlp", Spending(axes=(axis,)))
        shape = search(space, [limit(source.layout.count, most)])
        assert shape[other] == source.shape[other]
        assert shape[axis] < source.shape[axis]


def test_what_cannot_be_met_is_named_with_the_nearest() -> None:
    source = headed("llama")
    seconds = time(1.0, 0.01)
    space = SearchSpace(source, "mlp", Spending())
    with pytest.raises(ShearlingError) as raised:
        search(space, [limit(seconds, 2.0), limit(source.layout.count, 10**9, "--params")])
    # one block of 32 neurons takes 1 + 1 + 0.32
    assert "--speed 1x cannot be met" in str(raised.value)
    assert "layers=1, mlp=32" in str(raised.value)
    assert "gives --speed 2.320, which is the nearest" in str(raised.value)
    assert "--params" not in str(raised.value)


def test_the_nearest_is_told_from_what_was_asked() -> None:
    source = headed("llama")
    space = SearchSpace(source, "mlp", Spending())
    with pytest.raises(ShearlingError, match=r"gives --speed 2\.320001, which is the nearest"):
        search(space, [limit(lambda shape: time(1.0, 0.01)(shape) + 1e-6, 2.32)])
