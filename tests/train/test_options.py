"""What a user may write, and what is said of the rest."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shearling.errors import ShearlingError
from shearling.pruning.plan import parse_count
from shearling.train.heal import phases
from shearling.train.options import Options, parse
from shearling.train.schedule import factor


def test_pairs() -> None:
    found = parse(
        "cpt", 1000, ["lr=1e-4", "batch=4", "mix=constant", "weights.a=0.25", "weights.b=0.75"]
    )
    assert (found.lr, found.batch, found.mix) == (1e-4, 4, "constant")
    assert found.weights == {"a": 0.25, "b": 0.75}
    assert found.recipe == "cpt"
    assert parse("lora", 1, ["trackers=[tensorboard]"]).trackers == ("tensorboard",)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["lr"], "'lr' was given, but options are written as key=value"),
        (["learning_rate=1"], "learning_rate is not an option of healing; .*batch.*lr"),
        (["lr=fast"], r"lr: 'fast' was given, but a number"),
        (["batch=0"], "batch: 0 was given, but more than 0 was expected"),
        (["weights.a=0.5", "weights.b=0.6"], "weights sum to 1.1, but they must sum to 1"),
        (["lr=1", "lr.a=2"], "lr.a reaches inside lr, which is one value"),
        (["mix=best"], "mix: .*constant"),
        (["lora_lr=1e-3"], "lora_lr is of cpt-then-lora; the rate of cpt is lr"),
    ],
)
def test_pairs_that_will_not_do(pairs: list[str], message: str) -> None:
    with pytest.raises(ShearlingError, match=message):
        parse("cpt", 1000, pairs)


def test_unknown_recipe() -> None:
    with pytest.raises(ShearlingError, match="recipe: .*cpt.*distill"):
        parse("rlhf", 1000, [])


def test_rates_of_two_phases() -> None:
    given = parse("cpt-then-lora", 1000, ["lr=1e-4", "lora_lr=1e-3"])
    assert [(phase.recipe, phase.lr, phase.tokens) for phase in phases(given)] == [
        ("cpt", 1e-4, 500), ("lora", 1e-3, 500),
    ]  # fmt: skip
    assert [phase.lr for phase in phases(parse("cpt-then-lora", 9, ["lr=1e-4"]))] == [1e-4] * 2


@given(st.integers(1, 10**7), st.integers(1, 64), st.integers(2, 4096))
def test_steps_cover_the_tokens(tokens: int, batch: int, length: int) -> None:
    steps = Options(tokens=tokens, batch=batch).steps(length)
    assert (steps - 1) * batch * length < tokens <= steps * batch * length


@pytest.mark.parametrize(
    ("text", "expected"), [("200k", 200_000), ("1.5M", 1_500_000), ("2B", 2 * 10**9), ("7", 7)]
)
def test_counts(text: str, expected: int) -> None:
    assert parse_count(text, "--tokens") == expected


@pytest.mark.parametrize("text", ["", "0.8x", "many", "-5", "0"])
def test_counts_that_are_none(text: str) -> None:
    with pytest.raises(ShearlingError, match="--tokens"):
        parse_count(text, "--tokens")


@given(st.integers(1, 300), st.floats(0, 1), st.floats(0, 1))
def test_schedule(steps: int, warmup: float, final: float) -> None:
    """Rises to the peak, falls to its end, and never leaves (0, 1]."""
    shares = [factor(step, steps, warmup=warmup, final=final) for step in range(steps)]
    rise = math.ceil(warmup * steps)
    assert all(0 <= share <= 1 + 1e-12 for share in shares)
    assert shares[:rise] == pytest.approx([(step + 1) / rise for step in range(rise)])
    fall = shares[rise:]
    assert fall == sorted(fall, reverse=True)
    if len(fall) > 1:
        assert fall[0] == pytest.approx(1)
        assert fall[-1] == pytest.approx(final)
    if len(fall) > 2 and len(fall) % 2:
        assert fall[len(fall) // 2] == pytest.approx((1 + final) / 2)
