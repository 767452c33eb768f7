"""Shapes as users write them, and shapes that meet a budget."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import naive
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.plan import Spending, parse_layers, parse_params, parse_shape, shape_for
from shearling.pruning.preferences import BLOCKS_GIVE, PREFERENCES
from shearling.table.families import FAMILIES
from shearling.table.values import Shape
from tiny_models import LEADING, tiny_config

Models = Callable[[str], Path]


@cache
def headed(variant: str) -> SimpleNamespace:
    """What a plan looks at of a checkpoint, without one: config, table and sizes."""
    config = tiny_config(variant)
    family = FAMILIES[config.model_type]
    layout, shape = family.layout(config), family.shape(config)
    return SimpleNamespace(
        config=config, family=family, layout=layout, shape=shape, parameters=layout.count(shape)
    )


def cut_to(variant: str, layers: int, mlp: int) -> int:
    source = headed(variant)
    return source.layout.count(source.shape.with_(layers=layers, mlp=mlp))


LEAST, DEPTH, MLP = 32, 5, 50  # at least half of 50 neurons, in eights
STEPS = [*range(LEAST, MLP, 8), MLP]


# --- to a budget ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", LEADING)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_budget_is_met_and_used(variant: str, data: st.DataObject) -> None:
    source = headed(variant)
    params = data.draw(st.integers(cut_to(variant, 1, LEAST), source.parameters - 1))
    found = shape_for(source, params)
    # By trying every depth and width from where blocks give a third, deepest and widest first.
    block = cut_to(variant, 2, MLP) - cut_to(variant, 1, MLP)
    third = (source.parameters - params) / 3
    few = min(range(DEPTH), key=lambda n: abs(third - n * block))
    layers, mlp = next(
        (layers, mlp)
        for layers in range(DEPTH - few, 0, -1)
        for mlp in reversed(STEPS)
        if cut_to(variant, layers, mlp) <= params
    )
    assert found == source.shape.with_(layers=layers, mlp=mlp)
    assert source.layout.count(found) <= params
    source.family.check(source.config, found)


@pytest.mark.parametrize("variant", LEADING)
def test_the_last_parameter_counts(models: Models, variant: str) -> None:
    """At, and one below, what a shape needs; against the numbers of a stock model."""
    source = Checkpoint.open(models(variant))
    exact = cut_to(variant, 4, 40)
    assert shape_for(source, exact) == source.shape.with_(layers=4, mlp=40)
    assert shape_for(source, exact - 1) == source.shape.with_(layers=4, mlp=32)
    stock = naive.stock(models(variant))
    total = sum(p.numel() for p in stock.parameters())
    assert shape_for(source, total - 1) == source.shape.with_(mlp=48)
    one = sum(p.numel() for p in naive.blocks(stock)[0].parameters())
    assert shape_for(source, total - 4 * one) == source.shape.with_(layers=1)


@pytest.mark.parametrize("variant", LEADING)
def test_half_the_neurons_stay(variant: str) -> None:
    source = headed(variant)
    least = cut_to(variant, 2, LEAST)
    assert shape_for(source, least) == source.shape.with_(layers=2, mlp=LEAST)
    fewer = shape_for(source, least - 1)
    assert fewer["layers"] == 1
    assert fewer["mlp"] >= LEAST


@pytest.mark.parametrize("variant", ["llama", "gpt_neox", "opt"])
@pytest.mark.parametrize("below", [1, 10**4])
def test_a_budget_that_no_block_fits(variant: str, below: int) -> None:
    least = cut_to(variant, 1, LEAST)
    with pytest.raises(ShearlingError, match=f"{least:,}; ask for more.* --shape") as raised:
        shape_for(headed(variant), least - below)
    assert f"{least - below:,} parameters" in str(raised.value)


@pytest.mark.parametrize(
    ("neurons", "steps"),
    [(5, [5]), (8, [8]), (12, [8, 12]), (16, [8, 16]), (17, [16, 17]), (24, [16, 24])],
)
def test_few_neurons(neurons: int, steps: list[int]) -> None:
    """Where eight are more than half, or than all, of them."""
    llama = headed("llama")
    shape = llama.shape.with_(mlp=neurons)
    source = SimpleNamespace(**{**vars(llama), "shape": shape, "config": tiny_config("llama")})
    source.config.intermediate_size = neurons
    for mlp in steps:
        wanted = shape.with_(layers=3, mlp=mlp)
        assert shape_for(source, llama.layout.count(wanted)) == wanted
    with pytest.raises(ShearlingError, match="ask for more"):
        shape_for(source, llama.layout.count(shape.with_(layers=1, mlp=steps[0])) - 1)


# --- as written ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "total", "expected"),
    [
        ("0.8x", 1000, 800),
        ("0.8X", 1001, 800),
        (" 0.5 x ", 7, 3),
        ("0.29x", 100, 29),  # 0.29 * 100 is 28.999... in floating point
        ("0.999999999999x", 10**15, 999999999999000),
        ("113M", 10**9, 113 * 10**6),
        ("1.2B", 2 * 10**9, 12 * 10**8),
        ("1.2b", 2 * 10**9, 12 * 10**8),
        ("90k", 10**6, 90_000),
        ("999", 1000, 999),
        ("1", 2, 1),
    ],
)
def test_params(text: str, total: int, expected: int) -> None:
    assert parse_params(text, total) == expected


@given(st.integers(2, 10**12), st.integers(1, 999))
def test_a_share_is_exact(total: int, thousandths: int) -> None:
    wanted = total * thousandths // 1000
    if wanted:
        assert parse_params(f"0.{thousandths:03d}x", total) == wanted


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("1x", "1,000 parameters, but the model has 1,000"),
        ("2x", "2,000 parameters, but the model has 1,000"),
        ("0x", "asks for 0 parameters"),
        ("0.0001x", "asks for 0 parameters"),
        ("1000", "asks for 1,000"),
        ("1B", "asks for 1,000,000,000"),
        *((bad, "such as 0.8x or a number") for bad in ("", "x", "80%", "-1", "1e3", "0.8xx")),
        *((bad, "such as 0.8x or a number") for bad in ("nan", "inf", ".5x", "١", "9" * 5000)),
    ],
)
def test_params_that_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(ShearlingError, match=sentence):
        parse_params(text, 1000)


@pytest.mark.parametrize(
    ("variant", "text", "expected"),
    [
        ("llama", "layers=3", {"layers": 3}),
        ("llama", " layers = 3 , mlp=49", {"layers": 3, "mlp": 49}),
        ("llama", "kv_heads=2", {"kv_heads": 2, "heads": 6}),  # each group with its three heads
        ("llama", "heads=4,kv_heads=2", {"kv_heads": 2, "heads": 4}),
        ("llama", "heads=3", {"heads": 3}),
        ("llama", "hidden=35,vocab=60", {"hidden": 35, "vocab": 60}),
        ("gpt_neox", "hidden=28,heads=7", {"hidden": 28, "heads": 7}),
        ("gemma2", "mlp=1,layers=1", {"layers": 1, "mlp": 1}),
    ],
)
def test_shapes(variant: str, text: str, expected: dict[str, int]) -> None:
    source = headed(variant)
    assert parse_shape(text, source) == Shape({**source.shape, **expected})


@pytest.mark.parametrize(
    ("variant", "text", "sentence"),
    [
        ("llama", "", "--shape '' was given, but sizes such as layers=24,mlp=1024"),
        ("llama", "layers", "axes are layers, hidden, heads, kv_heads, mlp, vocab"),
        ("gpt_neox", "layers", "the axes are layers, hidden, heads, mlp, vocab."),
        ("llama", "layers=3,", "sizes such as"),
        ("llama", "layers=3.0", "sizes such as"),
        ("llama", "mlp=-3", "sizes such as"),
        ("llama", "mlp=" + "9" * 5000, "sizes such as"),
        ("llama", "mlp=²", "sizes such as"),
        ("llama", "mlp=3,mlp=3", "names mlp twice"),
        ("llama", "layers=0", "layers=0 was given, .* between 1 and the source's 5"),
        ("llama", "layers=6", "layers=6 was given, .* between 1 and the source's 5"),
        ("llama", "kv_heads=0", "kv_heads=0 was given"),
        ("llama", "kv_heads=4", "kv_heads=4 was given"),
        ("llama", "heads=7", "heads=7, kv_heads=3 cannot be written: .* nearest that can: heads="),
        ("llama", "head_dim=4", "head_dim of a llama model cannot be cut; leave it at 6"),
        ("llama", "mpl=4", "no axis 'mpl' .nearest: mlp"),
        ("gpt_neox", "kv_heads=2", "no axis 'kv_heads' .nearest: heads"),
        ("gpt_neox", "hidden=35", "nearest that can: hidden=36, heads=9|hidden=32, heads=8"),
        ("llama", "mlp=50,layers=5", "is the model's own .*name at least one smaller"),
    ],
)
def test_shapes_that_are_refused(variant: str, text: str, sentence: str) -> None:
    with pytest.raises(ShearlingError, match=sentence):
        parse_shape(text, headed(variant))


def test_layers() -> None:
    source = headed("llama")
    assert parse_layers(4, source) == source.shape.with_(layers=4)
    for layers in (0, 5, 6):
        with pytest.raises(ShearlingError, match=f"--layers {layers} .* between 1 and 4"):
            parse_layers(layers, source)


# --- what a budget cares for ---------------------------------------------------------------------


def test_a_preference_for_speed_takes_blocks() -> None:
    source = headed("llama")
    block = cut_to("llama", 5, MLP) - cut_to("llama", 4, MLP)
    fast = shape_for(source, source.parameters - 2 * block, spending=Spending("speed"))
    assert fast == source.shape.with_(layers=3)
    assert PREFERENCES["balanced"].blocks_give == BLOCKS_GIVE


@pytest.mark.parametrize(("axis", "other"), [("layers", "mlp"), ("mlp", "layers")])
def test_a_budget_takes_from_the_axes_named(axis: str, other: str) -> None:
    source = headed("llama")
    shape = shape_for(source, int(0.9 * source.parameters), spending=Spending(axes=(axis,)))
    assert shape[other] == source.shape[other]
    assert shape[axis] < source.shape[axis]
    with pytest.raises(ShearlingError, match="ask for more"):
        shape_for(source, 1000, spending=Spending(axes=(axis,)))


def test_a_budget_goes_on_from_where_words_went() -> None:
    source = headed("llama")
    start = source.shape.with_(vocab=60)
    shape = shape_for(source, int(0.6 * source.parameters), spending=Spending(start=start))
    assert shape["vocab"] == 60
    assert source.layout.count(shape) <= 0.6 * source.parameters
    assert shape_for(source, source.layout.count(start), spending=Spending(start=start)) == start
