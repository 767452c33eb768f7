"""Weights that follow losses: against the formula, a bisection, and every other choice."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shearling.errors import ShearlingError
from shearling.train.weights import (
    KINDS,
    Dynamic,
    Proportional,
    build,
    checked,
    into_bounds,
)

SIZES = {"web": 60, "code": 30, "books": 10}
REFERENCE = {"web": 2.0, "code": 1.0, "books": 2.5}
NAMES = list("abcde")

losses = st.fixed_dictionaries({name: st.floats(0, 12) for name in NAMES})


@st.composite
def shares(draw: st.DrawFn, least: int = 0) -> dict[str, float]:
    values = st.integers(least, 1000)
    raw = draw(st.lists(values, min_size=5, max_size=5).filter(any))
    return {name: value / sum(raw) for name, value in zip(NAMES, raw, strict=True)}


@st.composite
def bounds(draw: st.DrawFn) -> tuple[dict[str, float], dict[str, float]]:
    """Floors and caps between which some weights fit."""
    floors = {name: draw(st.floats(0, 0.5)) for name in NAMES}
    caps = {name: draw(st.floats(floors[name], 1)) for name in NAMES}
    assume(sum(floors.values()) <= 1 <= sum(caps.values()))
    return floors, caps


# --- the rule ------------------------------------------------------------------------------------


@given(shares(), losses, losses, st.sampled_from([0.0, 1e-4, 0.3]), st.floats(0.01, 3))
def test_one_update_is_the_papers_formula(
    start: dict[str, float],
    reference: dict[str, float],
    found: dict[str, float],
    c: float,
    rate: float,
) -> None:
    mix = Dynamic(dict.fromkeys(NAMES, 1), reference, start, smoothing=c, rate=rate)
    grown = {
        name: start[name] * math.exp(rate * max(found[name] - reference[name], 0)) for name in NAMES
    }
    expected = {name: (1 - c) * grown[name] / sum(grown.values()) + c / 5 for name in NAMES}
    assert mix.update(found, 1) == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert mix.current == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert math.fsum(mix.current.values()) == pytest.approx(1, abs=1e-14)


def test_by_hand() -> None:
    """Δ = ln 2, 0 (below its reference, hence clamped) and ln 3."""
    mix = Dynamic(SIZES, REFERENCE, {"web": 0.5, "code": 0.3, "books": 0.2}, smoothing=0.01)
    found = mix.update({"web": 2 + math.log(2), "code": 0.1, "books": 2.5 + math.log(3)}, 400)
    # 0.5·2 : 0.3·1 : 0.2·3 = 1 : 0.3 : 0.6, of 1.9
    assert found == pytest.approx(
        {
            "web": 0.99 / 1.9 + 0.01 / 3,
            "code": 0.99 * 0.3 / 1.9 + 0.01 / 3,
            "books": 0.99 * 0.6 / 1.9 + 0.01 / 3,
        },
        rel=1e-12,
    )


def test_below_every_reference_nothing_moves() -> None:
    mix = Dynamic(SIZES, REFERENCE, smoothing=0)
    assert mix.update({"web": 1.9, "code": 0.2, "books": 2.5}, 1) == pytest.approx(
        {"web": 0.6, "code": 0.3, "books": 0.1}, rel=1e-12
    )


def test_a_loss_beyond_the_floats_range_of_exp() -> None:
    mix = Dynamic(SIZES, REFERENCE, smoothing=0.03)
    assert mix.update({"web": 2.0, "code": 900.0, "books": 800.0}, 1) == pytest.approx(
        {"web": 0.01, "code": 0.98, "books": 0.01}
    )
    # A weight of 0 that is furthest above its reference does not hide the others.
    only = Dynamic(SIZES, REFERENCE, {"web": 0.5, "code": 0.5, "books": 0.0}, smoothing=0)
    assert only.update({"web": 2.0, "code": 1.0, "books": 5e4}, 1) == pytest.approx(
        {"web": 0.5, "code": 0.5, "books": 0.0}
    )


def test_smoothing_brings_a_domain_back() -> None:
    mix = Dynamic(SIZES, REFERENCE, {"web": 1.0, "code": 0.0, "books": 0.0})
    mix.update({"web": 2.0, "code": 9.0, "books": 2.0}, 1)
    assert mix.current["code"] == pytest.approx(1e-4 / 3)
    mix.update({"web": 2.0, "code": 9.0, "books": 2.0}, 2)
    assert mix.current["code"] > 0.08


def test_collapse_is_held_by_bounds() -> None:
    """A domain that never comes down takes everything, as users report; but not past its cap."""
    stuck = {"web": 2.0, "code": 3.0, "books": 2.5}
    free = Dynamic(SIZES, REFERENCE)
    held = Dynamic(SIZES, REFERENCE, floors={"books": 0.05}, caps=0.7)
    for step in range(50):
        free.update(stuck, step)
        held.update(stuck, step)
    assert free.current["code"] > 0.999
    assert held.current["code"] == pytest.approx(0.7)
    assert held.current["books"] >= 0.05
    assert sum(held.current.values()) == pytest.approx(1)


# --- bounds --------------------------------------------------------------------------------------


def bisected(
    weights: dict[str, float], floors: dict[str, float], caps: dict[str, float]
) -> dict[str, float]:
    """clip(τ·w) that sums to 1, by halving the interval of log τ."""

    def clipped(log_tau: float) -> dict[str, float]:
        tau = math.exp(log_tau)
        return {n: min(max(tau * w, floors[n]), caps[n]) for n, w in weights.items()}

    low, high = -60.0, 60.0
    for _ in range(80):  # 120 halved so often is less than what float64 tells apart
        middle = (low + high) / 2
        low, high = (low, middle) if sum(clipped(middle).values()) > 1 else (middle, high)
    return clipped(low)


@settings(max_examples=300)
@given(shares(least=1), bounds())
def test_bounds_equal_a_bisection(
    weights: dict[str, float], both: tuple[dict[str, float], dict[str, float]]
) -> None:
    floors, caps = both
    found = into_bounds(weights, floors, caps)
    assert math.fsum(found.values()) == pytest.approx(1, abs=1e-12)
    assert all(floors[name] <= found[name] <= caps[name] for name in NAMES)
    assert found == pytest.approx(bisected(weights, floors, caps), abs=1e-9)


@settings(max_examples=100)
@given(shares(least=1), bounds(), st.data())
def test_no_other_weights_within_bounds_are_nearer(
    weights: dict[str, float],
    both: tuple[dict[str, float], dict[str, float]],
    data: st.DataObject,
) -> None:
    """Relative entropy is convex, so moving a little from one domain to another decides it."""
    floors, caps = both
    found = into_bounds(weights, floors, caps)

    def entropy(mix: dict[str, float]) -> float:
        return math.fsum(x * math.log(x / weights[n]) if x > 0 else 0 for n, x in mix.items())

    for giver in NAMES:
        for taker in NAMES:
            room = min(found[giver] - floors[giver], caps[taker] - found[taker])
            step = room * data.draw(st.floats(0.01, 1))
            if giver != taker and room > 1e-6:
                moved = found | {giver: found[giver] - step, taker: found[taker] + step}
                assert entropy(moved) >= entropy(found) - 1e-12


@given(shares(), bounds())
def test_weights_of_nothing(
    weights: dict[str, float], both: tuple[dict[str, float], dict[str, float]]
) -> None:
    """Zeros get their floors, and more only when all others are at their caps."""
    floors, caps = both
    found = into_bounds(weights, floors, caps)
    assert math.fsum(found.values()) == pytest.approx(1, abs=1e-12)
    for name, value in found.items():
        assert floors[name] <= value <= caps[name]
        if weights[name] == 0 and value > floors[name] + 1e-12:
            assert all(found[n] == caps[n] for n in NAMES if weights[n] > 0)


def test_a_cap_on_all_that_has_weight() -> None:
    """What it leaves goes to the others alike, within their own bounds."""
    floors, caps = dict.fromkeys("abc", 0.0), {"a": 0.4, "b": 1.0, "c": 1.0}
    weights = {"a": 1.0, "b": 0.0, "c": 0.0}
    assert into_bounds(weights, floors, caps) == pytest.approx({"a": 0.4, "b": 0.3, "c": 0.3})
    assert into_bounds(weights, floors, caps | {"c": 0.1}) == pytest.approx(
        {"a": 0.4, "b": 0.5, "c": 0.1}
    )


@given(shares(), st.floats(0, 0.001), st.floats(0.999, 1))
def test_weights_within_bounds_stay(weights: dict[str, float], floor: float, cap: float) -> None:
    floors, caps = dict.fromkeys(NAMES, floor), dict.fromkeys(NAMES, cap)
    assume(all(floor <= weight <= cap for weight in weights.values()))
    assert into_bounds(weights, floors, caps) == weights


def test_a_floor_does_not_starve_the_small() -> None:
    """The Euclidean projection would take 0.1 from each, and leave the third with nothing."""
    floors = {"a": 0.2, "b": 0.0, "c": 0.0}
    found = into_bounds({"a": 0.0, "b": 0.95, "c": 0.05}, floors, dict.fromkeys("abc", 1.0))
    assert found == pytest.approx({"a": 0.2, "b": 0.76, "c": 0.04})


@pytest.mark.parametrize(
    ("floors", "caps"),
    [
        ({"web": 0.2, "code": 0.3, "books": 0.5}, 1.0),
        (0.0, {"web": 0.2, "code": 0.3, "books": 0.5}),
        (1 / 3, 1 / 3),
    ],
)
def test_bounds_that_leave_no_choice(floors: Any, caps: Any) -> None:
    mix = Dynamic(SIZES, REFERENCE, floors=floors, caps=caps)
    only = floors if isinstance(floors, dict) else caps
    only = only if isinstance(only, dict) else dict.fromkeys(SIZES, only)
    assert mix.current == pytest.approx(only, rel=1e-12)
    assert mix.update({"web": 9.0, "code": 1.0, "books": 2.0}, 1) == pytest.approx(only)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1, "low", None])
def test_a_loss_that_is_no_number(bad: Any) -> None:
    mix = Dynamic(SIZES, REFERENCE)
    before = dict(mix.current)
    with pytest.raises(ShearlingError, match=f"losses of step 400 give {bad} for the domain code"):
        mix.update({"web": 2.0, "code": bad, "books": 2.0}, 400)
    with pytest.raises(ShearlingError, match="step 8 lack books"):
        mix.update({"web": 2.0, "code": 2.0}, 8)
    assert mix.current == before
    with pytest.raises(ShearlingError, match=f"reference losses give {bad} for the domain code"):
        Dynamic(SIZES, REFERENCE | {"code": bad})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": {"web": 2.0}}, "reference losses lack code, books"),
        ({"initial": {"web": 1.0}}, "weights lack code, books"),
        ({"initial": {"web": 0.5, "code": 0.5, "books": 0.5}}, "sum to 1.5"),
        ({"smoothing": 1.0}, "smoothing of 1.0"),
        ({"smoothing": -0.1}, "smoothing of -0.1"),
        ({"smoothing": math.nan}, "smoothing of nan"),
        ({"rate": 0.0}, "rate of 0.0"),
        ({"rate": math.inf}, "rate of inf"),
        ({"rate": math.nan}, "rate of nan"),
        ({"floors": 0.4}, "floors sum to 1.2"),
        ({"caps": 0.3}, "caps sum to 0.9"),
        ({"caps": {"web": 0.2, "code": 0.2, "books": 0.2}}, "caps sum to 0.6"),
        ({"floors": {"web": 0.5}, "caps": {"web": 0.4}}, "web has the floor 0.5 above its cap 0.4"),
        ({"floors": {"music": 0.1}}, "floors name music"),
        ({"caps": {"code": 1.1}}, "caps give code 1.1"),
        ({"floors": {"code": -0.1}}, "floors give code -0.1"),
        ({"floors": {"code": math.nan}}, "floors give code nan"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ShearlingError, match=message):
        Dynamic(**({"sizes": SIZES, "reference": REFERENCE} | options))


def test_a_reference_may_know_more_domains() -> None:
    assert "music" not in Dynamic(SIZES, REFERENCE | {"music": 3.0}).current


@given(shares(), st.floats(-9e-7, 9e-7))
def test_checking_scales_once(weights: dict[str, float], off: float) -> None:
    first = next(name for name in NAMES if weights[name] > 0.1)
    once = checked(weights | {first: weights[first] + off}, NAMES)
    assert math.fsum(once.values()) == pytest.approx(1, abs=1e-15)
    assert checked(once, NAMES) == pytest.approx(once, rel=1e-15)


# --- kinds ---------------------------------------------------------------------------------------


def test_kinds() -> None:
    assert isinstance(build("proportional", SIZES), Proportional)
    assert build("proportional", SIZES).current == {"web": 0.6, "code": 0.3, "books": 0.1}
    given_weights = {"books": 0.5, "code": 0.25, "web": 0.25}
    assert build("constant", SIZES, weights=given_weights).current == given_weights
    assert build("constant", SIZES).current == pytest.approx(dict.fromkeys(SIZES, 1 / 3))
    dynamic = build("dynamic", SIZES, reference=REFERENCE, floors=0.2, caps=0.5, rate=2.0)
    assert isinstance(dynamic, Dynamic)
    assert dynamic.current == pytest.approx({"web": 0.5, "code": 0.3, "books": 0.2})
    assert dynamic.rate == 2.0
    assert build("dynamic", SIZES, reference=REFERENCE, weights=given_weights).current == (
        given_weights
    )


@pytest.mark.parametrize("kind", ["constant", "proportional"])
def test_fixed_mixes_stay(kind: str) -> None:
    mix = build(kind, SIZES)
    before = dict(mix.current)
    assert mix.update({"web": math.nan, "code": 9.0}, 1) == before
    assert mix.current == before


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("dynamical", {}, "'dynamical' was given, but one of constant, proportional, dynamic"),
        ("dynamic", {}, "without reference losses"),
        ("proportional", {"weights": {"web": 1.0}}, "leave them out"),
        ("constant", {"weights": {"web": 1.0}}, "lack code, books"),
    ],
)
def test_kinds_that_cannot_be(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ShearlingError, match=message):
        build(kind, SIZES, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_no_domains(kind: str) -> None:
    with pytest.raises(ShearlingError, match="no domains"):
        build(kind, {}, reference={})
    if kind != "constant":
        with pytest.raises(ShearlingError, match="code has no sequences"):
            build(kind, SIZES | {"code": 0}, reference=REFERENCE)


# --- state ---------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.lists(losses, min_size=1, max_size=6), losses, bounds())
def test_a_state_goes_on_exactly(
    seen: list[dict[str, float]],
    reference: dict[str, float],
    both: tuple[dict[str, float], dict[str, float]],
) -> None:
    floors, caps = both
    sizes = dict.fromkeys(NAMES, 3)
    whole = Dynamic(sizes, reference, floors=floors, caps=caps)
    expected = [whole.update(found, step) for step, found in enumerate(seen)]
    for stop in range(len(seen) + 1):
        first = Dynamic(sizes, reference, floors=floors, caps=caps)
        for step, found in enumerate(seen[:stop]):
            first.update(found, step)
        second = Dynamic(sizes, reference, floors=floors, caps=caps)
        second.load(json.loads(json.dumps(first.state())))
        assert second.current == first.current
        rest = [second.update(found, stop + i) for i, found in enumerate(seen[stop:])]
        assert rest == expected[stop:]


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_another_mix(kind: str) -> None:
    mix = build(kind, SIZES, reference=REFERENCE)
    before = dict(mix.current)
    for other in KINDS:
        if other != kind:
            state = build(other, SIZES, reference=REFERENCE).state()
            with pytest.raises(ShearlingError, match=f"'{other}' was given, .*'{kind}'"):
                mix.load(state)
    for wrong in ({"kind": kind}, {}, {"kind": kind, "weights": {"web": 1.0}}):
        with pytest.raises(ShearlingError):
            mix.load(wrong)
    assert mix.current == before


def test_what_is_handed_out_is_a_copy() -> None:
    for kind in KINDS:
        mix = build(kind, SIZES, reference=REFERENCE)
        before = dict(mix.current)
        mix.update(REFERENCE, 1)["web"] = 7.0
        mix.state()["weights"]["web"] = 7.0
        assert mix.current == pytest.approx(before, abs=1e-4)
