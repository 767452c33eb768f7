"""A scaling law for the loss in one domain: ℓ(N) = a·N^(−b) + c in nats per token.

N is a model's number of parameters, tied ones once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shearling.errors import ShearlingError

# Exponents tried where there is a constant as well. Published ones of losses in the number of
# parameters lie between 0.05 and 0.5 (arXiv 2001.08361, 2203.15556).
EXPONENTS = (1e-3, 2.0)


@dataclass(frozen=True)
class Law:
    """ℓ(N) = a·N^(−b) + c: nats per token of a model of N parameters, in one domain."""

    a: float
    b: float
    c: float

    def __call__(self, parameters: float) -> float:
        """The loss predicted at a size."""
        return self.a * parameters**-self.b + self.c


def fit(points: Sequence[tuple[int, float]], domain: str) -> Law:
    """The law that lies nearest to the losses of models of several sizes.

    Sizes are in parameters, losses in nats per token. The sum of squared relative errors is least,
    to first order the squared errors of the logarithms. For a fixed b that is a linear problem in
    a ≥ 0 and c ≥ 0 with a solution in closed form; b is found on a grid and then by golden
    section, between 0.001 and 2. Models of two sizes determine no constant: c is 0 then, and the
    fit that of a line to the logarithms. Sheared LLaMA (arXiv 2310.06694, section 2.2) predicts
    its reference losses with such a law, fitted to three models.

    Raises:
        ShearlingError: fewer than two sizes, a loss of 0, or losses that do not fall as models
            grow; the domain is named.
    """
    sizes = {size for size, _ in points}
    if len(sizes) < 2:
        raise ShearlingError(
            f"the losses in {domain} are of models of {len(sizes)} size, but a law needs at least "
            "two, and three to have a constant; measure further models of the family."
        )
    if not all(0 < loss < math.inf for _, loss in points):
        raise ShearlingError(
            f"the losses in {domain} are {', '.join(f'{loss:g}' for _, loss in points)}, but a law "
            "is fitted to numbers above 0; measure again, or give this one."
        )
    # Sizes relative to their geometric mean keep the problem well scaled.
    centre = math.fsum(math.log(size) for size, _ in points) / len(points)
    logs = [math.log(size) - centre for size, _ in points]
    losses = [loss for _, loss in points]
    if len(sizes) == 2:
        a, b, c = _line(logs, losses)
    else:
        b = _golden(lambda log_b: _linear(math.exp(log_b), logs, losses)[0])
        _, a, c = _linear(b, logs, losses)
    if not (a > 0 and b > 0):
        listed = ", ".join(f"{loss:.4g} at {size:,}" for size, loss in sorted(points))
        raise ShearlingError(
            f"the losses in {domain} do not fall as models grow ({listed} parameters), so that no "
            "scaling law fits them; use the source model's own losses, or give this one."
        )
    return Law(a * math.exp(b * centre), b, c)


def _line(logs: list[float], losses: list[float]) -> tuple[float, float, float]:
    """a, b and c = 0, by the least squares of logarithms; ``logs`` are centred on 0."""
    level = math.fsum(map(math.log, losses)) / len(losses)
    slope = math.fsum(x * (math.log(y) - level) for x, y in zip(logs, losses, strict=True))
    return math.exp(level), -slope / math.fsum(x * x for x in logs), 0.0


def _linear(b: float, logs: list[float], losses: list[float]) -> tuple[float, float, float]:
    """The least sum of squared relative errors for this b, and the a and c that give it."""
    # a·x + c = (a + c) + a·(x − 1): the second form stays well conditioned as b goes to 0.
    bent = [math.expm1(-b * log) for log in logs]
    weights = [loss**-2 for loss in losses]
    whole = math.fsum(weights)
    mean = math.fsum(w * e for w, e in zip(weights, bent, strict=True)) / whole
    level = math.fsum(w * y for w, y in zip(weights, losses, strict=True)) / whole
    square = math.fsum(w * (e - mean) ** 2 for w, e in zip(weights, bent, strict=True))
    cross = math.fsum(
        w * (e - mean) * (y - level) for w, e, y in zip(weights, bent, losses, strict=True)
    )
    a = cross / square
    candidates = [(a, level - a * mean - a)]
    if min(candidates[0]) < 0:  # the best of a quadrant's edges, where its inside has none
        top = math.fsum(w * (1 + e) * y for w, e, y in zip(weights, bent, losses, strict=True))
        bottom = math.fsum(w * (1 + e) ** 2 for w, e in zip(weights, bent, strict=True))
        candidates = [(top / bottom, 0.0), (0.0, level)]
    return min(
        (
            math.fsum(
                w * (a + c + a * e - y) ** 2 for w, e, y in zip(weights, bent, losses, strict=True)
            ),
            a,
            c,
        )
        for a, c in candidates
    )


def _golden(error: Callable[[float], float]) -> float:
    """The exponent of least error: the best of a grid, refined between its neighbours."""
    low, high = (math.log(b) for b in EXPONENTS)
    grid = [low + (high - low) * i / 200 for i in range(201)]
    best = min(range(len(grid)), key=lambda i: error(grid[i]))
    left, right = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    ratio = (math.sqrt(5) - 1) / 2
    while right - left > 1e-13:
        x, y = right - ratio * (right - left), left + ratio * (right - left)
        if error(x) <= error(y):
            right = y
        else:
            left = x
    return math.exp((left + right) / 2)
