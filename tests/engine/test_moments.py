"""Ridge regression against least squares on the whole, augmented system."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from shearling.engine import moments as ridge
from shearling.engine.moments import STRENGTHS, Moments, correct, held_apart, solve

Tokens = tuple[Tensor, Tensor, Tensor]


def drawn(tokens: int, inputs: int, outputs: int, seed: int = 0, noise: float = 1.0) -> Tokens:
    """Inputs with a mean, targets that hang on them and on a constant, uneven weights."""
    draw = torch.Generator().manual_seed(seed)
    x_TK = torch.randn(tokens, inputs, generator=draw, dtype=torch.float64) + 0.5
    truth_KD = torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(99)).double()
    noise_TD = torch.randn(tokens, outputs, generator=draw, dtype=torch.float64)
    w_T = 10 ** torch.empty(tokens, dtype=torch.float64).uniform_(-2, 1, generator=draw)
    return x_TK, x_TK @ truth_KD - 2 + noise * noise_TD, w_T


def moments(*sets: Tokens) -> Moments:
    found = Moments(torch.empty(sets[0][1].shape[1], sets[0][0].shape[1]))
    for x_TK, r_TD, w_T in sets:
        found.add(x_TK, r_TD, w_T)
    return found


def joined(*sets: Tokens) -> Tokens:
    x_TK, r_TD, w_T = (torch.cat(each) for each in zip(*sets, strict=True))
    return x_TK, r_TD, w_T


def least_squares(tokens: Tokens, strength: float, *, bias: bool) -> Tensor:
    """(K + 1, D): rows of tokens scaled by the root of their weight, and one row a penalty."""
    x_TK, r_TD, w_T = tokens
    k, root_T1 = x_TK.shape[1], w_T.sqrt()[:, None]
    energy_K = (w_T[:, None] * x_TK.square()).sum(0)
    penalty_K = strength * (energy_K * energy_K.mean()).sqrt()
    constant = torch.ones(len(x_TK), 1, dtype=torch.float64)
    x_T1K = torch.cat([x_TK, constant], 1) if bias else x_TK
    rows = torch.cat([x_T1K * root_T1, penalty_K.sqrt()[:, None] * torch.eye(k, x_T1K.shape[1])])
    wanted = torch.cat([r_TD * root_T1, r_TD.new_zeros(k, r_TD.shape[1])])
    found = torch.linalg.lstsq(rows, wanted, driver="gelsd").solution
    return found if bias else torch.cat([found, found.new_zeros(1, found.shape[1])])


def squared_error(tokens: Tokens, d_KD: Tensor) -> float:
    x_TK, r_TD, w_T = tokens
    return float((w_T[:, None] * (x_TK @ d_KD[:-1] + d_KD[-1] - r_TD).square()).sum())


SIZES = [(200, 7, 5), (40, 1, 3), (30, 12, 1), (9, 12, 4), (2, 25, 3), (1, 3, 2)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("strength", [0.01, 0.3, 10.0])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_solve(sizes: tuple[int, int, int], strength: float, bias: bool) -> None:
    tokens = drawn(*sizes)
    found = solve(moments(tokens), strength, bias=bias)
    expected = least_squares(tokens, strength, bias=bias)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    assert bool(found[-1].any()) == bias
    bare = solve(moments(tokens), strength, bias=not bias)
    assert not torch.allclose(bare, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("bias", [False, True])
def test_error(bias: bool) -> None:
    fit, held = drawn(60, 8, 5), drawn(25, 8, 5, seed=1)
    d_KD = solve(moments(fit), 0.1, bias=bias)
    assert moments(held).error(d_KD) == pytest.approx(squared_error(held, d_KD), rel=1e-9)
    nothing = torch.zeros_like(d_KD)
    assert moments(held).error(nothing) == pytest.approx(squared_error(held, nothing), rel=1e-12)


def test_outputs_of_unequal_importance() -> None:
    fit, held = drawn(60, 8, 5), drawn(25, 8, 5, seed=1)
    importance_D = torch.tensor([0.0, 1.0, 4.0, 0.25, 9.0])
    found = Moments(torch.empty(5, 8), importance_D)
    for x_TK, r_TD, w_T in (fit, held):
        found.add(x_TK.float(), r_TD.float(), w_T.float())
    found += Moments(torch.empty(5, 8), importance_D)
    plain = moments(fit, held)
    d_KD = solve(found, 0.1, bias=True)
    torch.testing.assert_close(d_KD, solve(plain, 0.1, bias=True), rtol=1e-4, atol=1e-4)
    x_TK, r_TD, w_T = joined(fit, held)
    left_TD = (x_TK @ d_KD[:-1] + d_KD[-1] - r_TD).square() * importance_D
    assert found.error(d_KD) == pytest.approx(float((w_T[:, None] * left_TD).sum()), rel=1e-4)


def test_moments_add_up() -> None:
    first, second, third = (drawn(n, 6, 4, seed=n) for n in (11, 1, 30))
    whole = moments(joined(first, second, third))
    parts = moments(first, third)
    parts += moments(second)
    for found in (moments(first, second, third), parts):
        assert found.tokens == 42
        assert found.square == pytest.approx(whole.square, rel=1e-12)
        torch.testing.assert_close(found.gram_KK, whole.gram_KK)
        torch.testing.assert_close(found.cross_KD, whole.cross_KD)
    one, other = moments(first), moments(second)
    one += other
    assert (one.tokens, other.tokens) == (12, 1), "what is added is left alone"
    torch.testing.assert_close(other.gram_KK, moments(second).gram_KK)
    assert not torch.allclose(one.gram_KK, moments(first).gram_KK)


def test_more_columns_than_tokens_and_dead_columns() -> None:
    x_TK, r_TD, w_T = drawn(3, 40, 6)
    x_TK[:, 5:9] = 0
    for bias in (False, True):
        found = solve(moments((x_TK, r_TD, w_T)), 0.01, bias=bias)
        assert found.isfinite().all()
        assert found[5:9].abs().max() < 1e-9
    silent = solve(moments((torch.zeros_like(x_TK), r_TD, w_T)), 0.01, bias=True)
    mean_D = (w_T[:, None] * r_TD).sum(0) / w_T.sum()
    torch.testing.assert_close(silent[-1], mean_D)
    assert not silent[:-1].any()


@pytest.mark.parametrize("broken", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("where", [0, 1])
def test_what_is_not_finite_is_told(where: int, broken: float) -> None:
    tokens = tuple(each.float() for each in drawn(10, 4, 3))
    assert moments(tokens).finite()  # ty: ignore[invalid-argument-type]
    tokens[where][3, 1] = broken
    assert not moments(tokens).finite()  # ty: ignore[invalid-argument-type]


def test_copies_are_held_out_with_their_text() -> None:
    """Five texts and three copies of each, in runs; the fourth is held out, and its copies."""
    ids_NS = torch.arange(20)[:, None]
    found = held_apart(ids_NS, lambda ids: [ids], windows=5)
    assert [(ids.flatten().tolist(), held) for ids, held in found] == [
        ([n for n in range(20) if n % 5 != 3], False),
        ([3, 8, 13, 18], True),
    ]


def test_an_input_that_was_never_stirred_is_left_alone() -> None:
    x_TK, r_TD, w_T = drawn(30, 4, 2)
    x_TK[:, 2] = 0
    found = solve(moments((x_TK, r_TD, w_T)), 0.1, bias=False)
    assert found.isfinite().all()
    assert not found[2].any()


# --- the strength --------------------------------------------------------------------------------


def brute_force(fit: Tokens, held: Tokens, *, bias: bool) -> dict[float | None, float]:
    errors: dict[float | None, float] = {
        strength: squared_error(held, least_squares(fit, strength, bias=bias))
        for strength in STRENGTHS
    }
    return errors | {None: float((held[2][:, None] * held[1].square()).sum())}


def unimodal(errors: list[float]) -> bool:
    lowest = errors.index(min(errors))
    falling, rising = errors[: lowest + 1], errors[lowest:]
    return falling == sorted(falling, reverse=True) and rising == sorted(rising)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("start", [0.01, 1.0, 10.0])
def test_the_best_strength(start: float, bias: bool) -> None:
    """Brute force over the grid; noise moves the best from one end of it to the other."""
    chosen = set()
    for noise in (0.01, 1.0, 5.0, 10.0, 20.0, 40.0):
        for seed in range(3):
            fit, held = drawn(30, 12, 6, seed, noise), drawn(90, 12, 6, seed + 50, noise)
            errors = brute_force(fit, held, bias=bias)
            if not unimodal([errors[strength] for strength in STRENGTHS]):
                continue
            best = min(errors, key=lambda strength: errors[strength])
            found = correct(moments(fit), moments(held), bias=bias, start=start)
            assert found.strength == best
            assert found.error_before == pytest.approx(errors[None], rel=1e-9)
            assert found.error_after == pytest.approx(errors[best], rel=1e-7)
            chosen.add(best)
            if best is not None:
                whole = least_squares(joined(fit, held), best, bias=bias)
                torch.testing.assert_close(found.weight_KD, whole[:-1], rtol=1e-6, atol=1e-8)
                torch.testing.assert_close(found.bias_D, whole[-1], rtol=1e-6, atol=1e-8)
    assert len(chosen) >= 4, "noise is to move the best strength"


@pytest.mark.parametrize("bias", [False, True])
def test_noise_is_left_alone(bias: bool) -> None:
    """Where held-out tokens say that a correction hurts, there is none."""
    draw = torch.Generator().manual_seed(5)

    def noise(tokens: int) -> Tokens:
        x_TK, r_TD, w_T = drawn(tokens, 12, 6, seed=tokens)
        return x_TK, torch.randn(r_TD.shape, generator=draw, dtype=torch.float64), w_T

    fit, held = noise(20), noise(500)
    errors = brute_force(fit, held, bias=bias)
    assert min(errors, key=lambda strength: errors[strength]) is None, "the case is none"
    found = correct(moments(fit), moments(held), bias=bias)
    assert found.strength is None
    assert found.error_after == found.error_before
    assert not found.weight_KD.any()
    assert not found.bias_D.any()


def test_a_good_start_saves_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    fit, held = drawn(300, 12, 6, 0, 0.1), drawn(90, 12, 6, 1, 0.1)
    asked: list[float] = []

    def counted(tokens: Moments, strength: float, *, bias: bool) -> Tensor:
        asked.append(strength)
        return solve(tokens, strength, bias=bias)

    monkeypatch.setattr(ridge, "solve", counted)
    assert correct(moments(fit), moments(held), bias=True, start=0.011).strength == 0.01
    assert sorted(asked) == [0.01, 0.01, 0.03]


def test_strengths_go_from_gentle_to_strong() -> None:
    assert list(STRENGTHS) == sorted(set(STRENGTHS))
    assert STRENGTHS[0] > 0
