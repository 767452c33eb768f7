"""Weights of the domains in a mixture, fixed or steered by losses while training goes on.

Weights map a domain's name to its share of the sequences drawn; they are at least 0 and sum to 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from shearling.errors import ShearlingError, told

KINDS = ("constant", "proportional", "dynamic")
SMOOTHING = 1e-4  # c of the paper's rule
TOLERANCE = 1e-6  # by which a sum of weights may miss 1

Bound = Mapping[str, float] | float


class Weights(Protocol):
    """What a training loop asks for the mix of its next steps."""

    current: dict[str, float]

    def update(self, losses: Mapping[str, float], step: int) -> dict[str, float]:
        """Take held-out losses (nats per token) found after ``step`` steps; the new weights."""
        ...

    def state(self) -> dict[str, Any]:
        """What :meth:`load` needs to go on exactly, as JSON can hold it."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state (ShearlingError if it is of another kind or of other domains)."""
        ...


class Constant:
    """The same weights at every step.

    Args:
        weights: share of each domain.

    Raises:
        ShearlingError: no domains, or weights that are not shares of one whole.
    """

    kind = "constant"

    def __init__(self, weights: Mapping[str, float]) -> None:
        """Check the weights."""
        self.current = checked(weights, weights)

    def update(self, losses: Mapping[str, float], step: int) -> dict[str, float]:
        """The weights; losses change nothing and are not looked at."""
        return dict(self.current)

    def state(self) -> dict[str, Any]:
        """Kind and weights."""
        return {"kind": self.kind, "weights": dict(self.current)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, with its weights.

        Raises:
            ShearlingError: another kind, other domains, or weights that are none.
        """
        if state.get("kind") != self.kind or not isinstance(state.get("weights"), Mapping):
            raise ShearlingError(
                f"a state of the mix {told(state.get('kind'))} was given, but this run's mix is "
                f"{self.kind!r}; resume with the mix that the run began with."
            )
        self.current = checked(state["weights"], self.current)


class Proportional(Constant):
    """Each domain by its share of all sequences.

    Args:
        sizes: sequences in each domain.

    Raises:
        ShearlingError: no domains, or one without sequences.
    """

    kind = "proportional"

    def __init__(self, sizes: Mapping[str, int]) -> None:
        """Turn sizes into shares."""
        super().__init__(shares(sizes))


class Dynamic(Constant):
    """Dynamic batch loading: weight goes where the loss is furthest above its reference.

    One update takes each domain's held-out loss ℓ to
    Δ = max(ℓ − ℓ_ref, 0);  w ← w·exp(rate·Δ), normalised;  w ← (1 − c)·w + c/k
    for k domains and the smoothing c, and then into the floors and caps (:func:`into_bounds`).
    Sheared LLaMA, arXiv 2310.06694, algorithm 1; the clamp is the paper's, which its code leaves
    out. There, updates come every 50 steps while gates are learnt and every 400 afterwards. The
    rule adds up Δ over all updates, so that a domain that stays above its reference for long
    takes nearly everything: hence floors and caps, which the paper lacks, and ``rate``.

    Args:
        sizes: sequences in each domain.
        reference: the loss to come down to in each domain, nats per token; it may name others.
        initial: weights to begin with, brought into the bounds; without, by the sizes.
        smoothing: c, at least 0 and below 1. At 0 a weight that is 0 stays so.
        floors: the least weight of the domains named, or of all if it is one number.
        caps: the greatest, likewise.
        rate: strength of one update; 1 in the paper.

    Raises:
        ShearlingError: a domain without reference, numbers out of range, or bounds that no
            weights can meet.
    """

    kind = "dynamic"

    def __init__(
        self,
        sizes: Mapping[str, int],
        reference: Mapping[str, float],
        initial: Mapping[str, float] | None = None,
        *,
        smoothing: float = SMOOTHING,
        floors: Bound = 0.0,
        caps: Bound = 1.0,
        rate: float = 1.0,
    ) -> None:
        """Check everything before the first step."""
        weights = checked(shares(sizes) if initial is None else initial, sizes)
        self.reference = losses_of(sizes, reference, "reference losses")
        if not 0 <= smoothing < 1:
            raise ShearlingError(
                f"a smoothing of {smoothing} was given, but at least 0 and less than 1 was "
                f"expected; the paper's is {SMOOTHING}."
            )
        if not (math.isfinite(rate) and rate > 0):
            raise ShearlingError(
                f"a rate of {rate} was given, but a number above 0 was expected; the paper's is 1."
            )
        self.smoothing, self.rate = smoothing, rate
        self.floors, self.caps = _bounds(sizes, floors, caps)
        self.current = into_bounds(weights, self.floors, self.caps)

    def update(self, losses: Mapping[str, float], step: int) -> dict[str, float]:
        """New weights from held-out losses (nats per token) found after ``step`` steps.

        Raises:
            ShearlingError: a loss that is missing or not a number; the weights stay as they were.
        """
        current_losses = losses_of(self.current, losses, f"held-out losses of step {step}")
        over = {
            name: max(current_losses[name] - self.reference[name], 0.0) for name in self.current
        }
        # exp relative to the greatest, which normalising undoes: exp(800) is beyond a float.
        top = max(over[name] for name, weight in self.current.items() if weight > 0)
        grown = {
            name: weight * math.exp(self.rate * (over[name] - top)) if weight > 0 else 0.0
            for name, weight in self.current.items()
        }
        total, c = math.fsum(grown.values()), self.smoothing
        smooth = {name: (1 - c) * weight / total + c / len(grown) for name, weight in grown.items()}
        self.current = into_bounds(smooth, self.floors, self.caps)
        return dict(self.current)


def build(
    kind: str,
    sizes: Mapping[str, int],
    *,
    weights: Mapping[str, float] | None = None,
    reference: Mapping[str, float] | None = None,
    smoothing: float = SMOOTHING,
    floors: Bound = 0.0,
    caps: Bound = 1.0,
    rate: float = 1.0,
) -> Weights:
    """The mix that a recipe names.

    Args:
        kind: ``constant`` (as ``weights`` say, or all domains alike), ``proportional``, or
            ``dynamic`` (needs ``reference``; ``weights`` are what it begins with). The rest is
            for ``dynamic`` and not looked at otherwise, so that one recipe serves to compare.
        sizes: sequences in each domain.
        weights, reference, smoothing, floors, caps, rate: as for the classes.

    Raises:
        ShearlingError: an unknown kind, what it needs missing, or as the classes.
    """
    if kind == "constant":
        alike = dict.fromkeys(sizes, 1 / max(len(sizes), 1))
        return Constant(checked(alike if weights is None else weights, sizes))
    if kind == "proportional":
        if weights is not None:
            raise ShearlingError(
                "weights were given for a proportional mix, which takes them from the sizes; "
                "leave them out, or use constant."
            )
        return Proportional(sizes)
    if kind == "dynamic":
        if reference is None:
            raise ShearlingError(
                "a dynamic mix was asked for without reference losses; make them with "
                "shearling reference, or use proportional."
            )
        return Dynamic(
            sizes, reference, weights, smoothing=smoothing, floors=floors, caps=caps, rate=rate
        )
    raise ShearlingError(f"a mix {kind!r} was given, but one of {', '.join(KINDS)} was expected.")


def shares(sizes: Mapping[str, int]) -> dict[str, float]:
    """Each domain's share of all sequences (ShearlingError if one has none)."""
    empty = [name for name, size in sizes.items() if size < 1]
    if empty or not sizes:
        raise ShearlingError(
            f"the domain {empty[0]} has no sequences; leave it out, or give it more text."
            if empty
            else "no domains were given; a mixture needs at least one."
        )
    total = sum(sizes.values())
    return {name: size / total for name, size in sizes.items()}


def checked(weights: Mapping[str, float], domains: Iterable[str]) -> dict[str, float]:
    """Weights in the order of ``domains``, scaled to sum to 1 as nearly as floats can.

    Raises:
        ShearlingError: other domains, a weight that is negative or no finite number, or a sum
            that misses 1 by more than 1e-6.
    """
    names = list(domains)
    _same_domains(names, weights, "weights", others=False)
    values = {name: _number(weights[name]) for name in names}
    bad = {name: weights[name] for name, value in values.items() if not 0 <= value < math.inf}
    if bad:
        name, value = next(iter(bad.items()))
        raise ShearlingError(
            f"the domain {name} has the weight {value}, but a number of at least 0 was expected."
        )
    total = math.fsum(values.values())
    if abs(total - 1) > TOLERANCE:
        raise ShearlingError(
            f"the weights of {', '.join(names)} sum to {total:.9g}, but 1 was expected; divide "
            "each by their sum."
            if names
            else "no domains were given; a mixture needs at least one."
        )
    # What is within a few roundings of 1 stays as it is, so that checking twice changes nothing.
    return values if abs(total - 1) < 1e-15 else {n: v / total for n, v in values.items()}


def losses_of(domains: Iterable[str], losses: Mapping[str, float], what: str) -> dict[str, float]:
    """The losses of ``domains``, nats per token, in their order; others are passed over.

    Raises:
        ShearlingError: one is missing, negative or not a finite number; it is named.
    """
    names = list(domains)
    _same_domains(names, losses, what, others=True)
    for name in names:
        if not 0 <= _number(losses[name]) < math.inf:
            raise ShearlingError(
                f"the {what} give {_short(losses[name])} for the domain {_short(name)}, but a "
                "number of at least 0 nats per token was expected; check the model and the text "
                "of this domain."
            )
    return {name: float(losses[name]) for name in names}


def into_bounds(
    weights: Mapping[str, float], floors: Mapping[str, float], caps: Mapping[str, float]
) -> dict[str, float]:
    """The weights within floors and caps that are nearest in relative entropy.

    They are clip(τ·w, floor, cap) with the one τ for which they sum to 1: domains at no bound
    keep their ratios. (The nearest in Euclidean distance would take the same amount from each
    domain to pay for a floor, and so starve the small ones to 0.) τ is exact: the sum is a
    piecewise linear function of it, and the piece that reaches 1 is solved.

    Args:
        weights: at least 0, summing to 1.
        floors, caps: for the same domains, floors summing to at most 1 and caps to at least 1.
    """
    if all(floors[name] <= weight <= caps[name] for name, weight in weights.items()):
        return dict(weights)
    live = {name: weight for name, weight in weights.items() if weight > 0}
    zero = dict.fromkeys((name for name in weights if name not in live), 1.0)
    room = 1 - math.fsum(floors[name] for name in zero)
    most = math.fsum(caps[name] for name in live)
    if most >= room:  # what has no weight gets its floor
        filled = {name: floors[name] for name in zero} | _fill(live, floors, caps, room)
    else:  # all others are at their caps, and the rest is spread evenly
        filled = {name: caps[name] for name in live} | _fill(zero, floors, caps, 1 - most)
    return {name: filled[name] for name in weights}


def _fill(
    weights: Mapping[str, float], floors: Mapping[str, float], caps: Mapping[str, float],
    total: float,
) -> dict[str, float]:  # fmt: skip
    """clip(τ·w, floor, cap) with the τ for which they sum to ``total``; every w is above 0."""

    def clipped(tau: float) -> dict[str, float]:
        return {n: min(max(tau * w, floors[n]), caps[n]) for n, w in weights.items()}

    enter = {name: floors[name] / weight for name, weight in weights.items()}
    leave = {name: caps[name] / weight for name, weight in weights.items()}
    knots = sorted({0.0, *enter.values(), *leave.values()})
    above = [math.fsum(clipped(tau).values()) >= total for tau in knots]
    last = above.index(True) if True in above else len(knots) - 1
    end, start = knots[last], knots[max(last - 1, 0)]
    free = [name for name in weights if enter[name] <= start and leave[name] >= end]
    if start == end or not free or math.isinf(end):
        return clipped(end)
    held = math.fsum(value for name, value in clipped(end).items() if name not in free)
    tau = (total - held) / math.fsum(weights[name] for name in free)
    return clipped(min(max(tau, start), end))


def _bounds(
    domains: Iterable[str], floors: Bound, caps: Bound
) -> tuple[dict[str, float], dict[str, float]]:
    """Floors and caps for every domain (ShearlingError if no weights can meet them)."""
    names = list(domains)
    every: list[dict[str, float]] = []
    for what, given, default in (("floors", floors, 0.0), ("caps", caps, 1.0)):
        named = given if isinstance(given, Mapping) else dict.fromkeys(names, given)
        unknown = [name for name in named if name not in names]
        wrong = [name for name, value in named.items() if not 0 <= _number(value) <= 1]
        if unknown or wrong:
            fault = f"name {unknown[0]}" if unknown else f"give {wrong[0]} {named[wrong[0]]}"
            raise ShearlingError(
                f"the {what} {fault}, but shares between 0 and 1 of {', '.join(names)} were "
                "expected."
            )
        every.append({name: float(named.get(name, default)) for name in names})
    least, most = every
    crossed = [name for name in names if least[name] > most[name]]
    if crossed:
        name = crossed[0]
        raise ShearlingError(
            f"the domain {name} has the floor {least[name]} above its cap {most[name]}; lower "
            "the floor or raise the cap."
        )
    low, high = math.fsum(least.values()), math.fsum(most.values())
    if low > 1 + TOLERANCE or high < 1 - TOLERANCE:
        fault, remedy = (f"floors sum to {low:.6g}", "lower some floors")
        if high < 1 - TOLERANCE:
            fault, remedy = (f"caps sum to {high:.6g}", "raise some caps")
        raise ShearlingError(
            f"the {fault}, but weights that sum to 1 have to fit between floors and caps; {remedy}."
        )
    return least, most


def _same_domains(names: list[str], given: Mapping[str, float], what: str, *, others: bool) -> None:
    """Every name given, and no others unless they are welcome (ShearlingError)."""
    missing = [name for name in names if name not in given]
    unknown = [] if others else [name for name in given if name not in names]
    if missing or unknown:
        fault = f"lack {', '.join(missing)}" if missing else f"name {', '.join(unknown)}"
        raise ShearlingError(
            f"the {what} {fault}, but the domains are {', '.join(names)}; give one for each."
        )


def _short(value: Any) -> str:
    """A value as Python writes it, its first characters."""
    shown = str(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _number(value: Any) -> float:
    """A float, NaN for what is no number."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
