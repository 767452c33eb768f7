"""Ridge regression centred on the weights there are, its strength chosen on held-out tokens.

Given inputs X and what is missing from the outputs R, both with token weights w, the correction

    D = argmin  sum_t w_t |x_t D - r_t|^2 + sum_k mu_k |D_k|^2

is added to the weights. An input's penalty grows with the root of its energy g_k (the Gram's
diagonal), mu_k = strength * sqrt(g_k * mean g): between a penalty alike for all, which leaves
quiet inputs unused, and one that ignores their scale (LOG.md, 2026-11-22). Centred on zero instead,
the same regression made a pruned model worse than no repair at all: 16 thousand tokens cannot
carry a whole matrix.

Shapes: T tokens, K inputs, D outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shearling.engine.ranks import ALONE, Ranks

# From gentle to strong; beyond the last, no correction at all is the better choice.
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
# Above so many inputs sums are kept in float32: four Gram matrices of 6,656 inputs would otherwise
# take 1.4 GB, and the penalty keeps the system far from singular.
DOUBLE_INPUTS = 4096
ROWS = 2048  # of a Gram matrix computed at a time, so that no second one is alive


# Every fourth sequence chooses the strength.
HELD_OUT = 4


def held_rows(count: int, windows: int | None = None) -> Tensor:
    """Which of so many sequences are held out (N).

    With ``windows``, sequences ``windows`` apart are copies of one text and go together.
    """
    return torch.arange(count) % (windows or max(1, count)) % HELD_OUT == HELD_OUT - 1


def held_apart(
    ids_NS: Tensor,
    batches: Callable[[Tensor], list[Tensor]],
    windows: int | None = None,
    ranks: Ranks = ALONE,
) -> list[tuple[Tensor, bool]]:
    """This rank's batches to fit on, then those held out, each with whether it is.

    None holds of both. ``windows`` are those of :func:`held_rows`.
    """
    rows = held_rows(len(ids_NS), windows)
    return [
        (ids_BS, held)
        for held, chosen in ((False, ~rows), (True, rows))
        for ids_BS in batches(ranks.share(ids_NS[chosen], backward=held))
        if len(ids_BS)
    ]


def inverse_energy(h_TD: Tensor) -> Tensor:
    """Weights (...) by which every token's state (..., D) counts alike, however long it is."""
    return 1 / h_TD.square().sum(-1).clamp_min(1e-12)


class Moments:
    """Weighted second moments of inputs and of what is missing, summed over batches."""

    def __init__(self, weight_DK: Tensor, importance_D: Tensor | None = None) -> None:
        """Start empty; with a constant as one more input, which a bias can take up.

        Args:
            weight_DK: the matrix in question; sums are kept where it lies.
            importance_D: how often errors count an output's square; the correction does not
                depend on it.
        """
        outputs, inputs = weight_DK.shape
        ones_D = weight_DK.new_ones(outputs, dtype=torch.float64)
        self.importance_D = ones_D if importance_D is None else importance_D.double()
        dtype = torch.float64 if inputs <= DOUBLE_INPUTS else torch.float32
        self.gram_KK = weight_DK.new_zeros(inputs + 1, inputs + 1, dtype=dtype)
        self.cross_KD = weight_DK.new_zeros(inputs + 1, outputs, dtype=dtype)
        self._square = weight_DK.new_zeros((), dtype=torch.float64)
        self.tokens = 0

    @property
    def square(self) -> float:
        """Weighted squared norm of what is missing."""
        return float(self._square)

    def add(self, x_TK: Tensor, r_TD: Tensor, w_T: Tensor) -> None:
        """Take tokens in: inputs (T, K), missing outputs (T, D), weights (T,)."""
        k = x_TK.shape[1]
        xw_KT = (x_TK * w_T[:, None]).T.contiguous()
        # As linear layers these products take the faster library (shearling.engine.products).
        for rows in torch.arange(k).split(ROWS):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            self.gram_KK[part, :k] += nn.functional.linear(xw_KT[part], x_TK.T)
        sums_K = xw_KT.sum(1).to(self.gram_KK.dtype)
        self.gram_KK[:k, k] += sums_K
        self.gram_KK[k, :k] += sums_K
        self.gram_KK[k, k] += w_T.sum(dtype=torch.float64)
        self.cross_KD[:k] += nn.functional.linear(xw_KT, r_TD.T)
        self.cross_KD[k] += (r_TD * w_T[:, None]).sum(0)
        self._square += (w_T @ r_TD.square()).double() @ self.importance_D
        self.tokens += len(x_TK)

    def __iadd__(self, other: Moments) -> Moments:
        """Take another set of tokens in; in place, since these matrices are large."""
        self.gram_KK += other.gram_KK
        self.cross_KD += other.cross_KD
        self._square += other._square
        self.tokens += other.tokens
        return self

    def add_up(self, ranks: Ranks) -> None:
        """Have every rank hold the sums over the tokens of all."""
        ranks.add(self.gram_KK, self.cross_KD, self._square)
        self.tokens = int(ranks.total(self.tokens))

    def finite(self) -> bool:
        """Whether no activation overflowed or was NaN."""
        finite = self.gram_KK.isfinite().all() and self.cross_KD.isfinite().all()
        return bool(finite) and math.isfinite(self.square)

    def error(self, d_KD: Tensor) -> float:
        """Weighted squared error, summed over tokens, that a correction leaves."""
        fitted_D = (d_KD * (self.gram_KK @ d_KD - 2 * self.cross_KD)).sum(0)
        return self.square + float(fitted_D.double() @ self.importance_D)


@dataclass(frozen=True, slots=True)
class Correction:
    """What to add to a writer.

    Attributes:
        weight_KD: to the weights, transposed.
        bias_D: to the bias; zeros where there is none.
        strength: of the penalty, relative to the inputs' energies; None for no correction.
        error_before, error_after: share of the held-out squared norm that was, and is, missing.
    """

    weight_KD: Tensor
    bias_D: Tensor
    strength: float | None
    error_before: float
    error_after: float


@contextmanager
def _every_digit() -> Generator[None]:
    """Solve without TF32: what is compared differs by less than its rounding."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def solve(moments: Moments, strength: float, *, bias: bool) -> Tensor:
    """The correction (K + 1, D) at one strength; its last row is the bias, zero without one.

    The penalty leaves the bias free. A Gram matrix of fewer tokens than inputs is singular, and
    the penalty alone makes it solvable.
    """
    cross = moments.cross_KD[: _inputs(moments, bias)]
    factor = _penalised(moments, strength, bias=bias)
    info = torch.empty((), dtype=torch.int32, device=factor.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))  # in place: these matrices are large
    if int(info) == 0:
        correction = torch.cholesky_solve(cross, factor)
    else:
        # Rare, and this driver is there for the processor alone.
        gram = _penalised(moments, strength, bias=bias).cpu()
        correction = torch.linalg.lstsq(gram, cross.cpu(), driver="gelsd").solution.to(cross.device)
    if bias:
        return correction
    return torch.cat([correction, correction.new_zeros(1, correction.shape[1])])


def _inputs(moments: Moments, bias: bool) -> int:
    return moments.gram_KK.shape[0] - (0 if bias else 1)


def _penalised(moments: Moments, strength: float, *, bias: bool) -> Tensor:
    k, size = moments.gram_KK.shape[0] - 1, _inputs(moments, bias)
    gram = moments.gram_KK[:size, :size].clone()
    energy_K = moments.gram_KK.diagonal()[:k].clamp_min(0)
    mean = float(energy_K.mean())
    # The floor keeps an input that was never stirred from making the matrix singular.
    penalty_K = (energy_K * mean).sqrt().clamp_min(1e-6 * mean)
    gram.diagonal()[:k] += strength * penalty_K + 1e-12 * mean + 1e-300
    return gram


def correct(
    fit: Moments,
    held: Moments,
    *,
    bias: bool,
    start: float = 1.0,
    refit: bool = True,
    ranks: Ranks = ALONE,
) -> Correction:
    """Choose the strength on held-out tokens, then solve on all of them (on ``fit`` alone if not
    ``refit``). ``fit`` then holds all of them.

    The held-out error has one valley in the strength; it is walked down from ``start``, so that
    two or three systems are solved for most matrices instead of all seven. Ranks, which hold the
    same moments, solve one each at a time; the first one solves the last, and all get it.
    """
    with _every_digit():
        errors = _Errors(fit, held, bias, ranks)
        best = errors.best(start)
        return _corrected(fit, held, errors, best, refit=refit)


class _Errors:
    """Held-out errors by strength; None is no correction at all."""

    def __init__(self, fit: Moments, held: Moments, bias: bool, ranks: Ranks) -> None:
        self.fit, self.held, self.bias, self.ranks = fit, held, bias, ranks
        self.asked: dict[float | None, float] = {None: held.square}
        self._known: dict[int, float] = {}

    def best(self, start: float) -> float | None:
        """The strength with the least error, walking down from ``start``."""
        at = min(range(len(STRENGTHS)), key=lambda i: abs(STRENGTHS[i] - start))
        if self.ranks.size > 1:
            self._solve([at, at - 1, at + 1])
        for step in (-1, 1):
            while 0 <= at + step < len(STRENGTHS) and self._at(at + step, step) < self._at(at, 1):
                at += step
        return min(self.asked, key=lambda strength: self.asked[strength])

    def _at(self, at: int, step: int) -> float:
        if at not in self._known:
            self._solve([at, at + step, at + 2 * step])
        return self.asked.setdefault(STRENGTHS[at], self._known[at])

    def _solve(self, wanted: list[int]) -> None:
        """Solve for the first of some strengths, and by other ranks for those behind it."""
        new = [at for at in wanted if 0 <= at < len(STRENGTHS) and at not in self._known]
        new = new[: self.ranks.size]
        mine = [0.0] * len(new)
        if self.ranks.rank < len(new):
            solved = solve(self.fit, STRENGTHS[new[self.ranks.rank]], bias=self.bias)
            mine[self.ranks.rank] = self.held.error(solved)
        self._known |= dict(zip(new, self.ranks.totals(mine), strict=True))


def _corrected(
    fit: Moments, held: Moments, errors: _Errors, best: float | None, *, refit: bool
) -> Correction:
    ranks = errors.ranks
    if best is None:
        correction = torch.zeros_like(fit.cross_KD)
    else:
        if refit:
            fit += held
        if ranks.first:
            correction = solve(fit, best, bias=errors.bias)
        else:
            correction = torch.empty_like(fit.cross_KD)
        correction = ranks.same(correction)
    return Correction(correction[:-1], correction[-1], best, held.square, errors.asked[best])
