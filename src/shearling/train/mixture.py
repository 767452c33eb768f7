"""Which sequences a training step sees: an order that depends on the seed and the step alone.

Every rank computes the whole global batch and takes its own slots from it, so the order is the
same on any number of ranks, and a run can be resumed on another number. What has to be remembered
is one number for each domain: how many of its sequences were taken.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from shearling.errors import ShearlingError
from shearling.train.weights import checked, shares

# Branches of the seed: what is drawn for one purpose is independent of what is drawn for another.
_STEPS, _ROWS = 0, 1
_ROUNDS = 24  # with 12, some orders of five rows come up half as often again as others
_MIX = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))  # MurmurHash3's finaliser


@dataclass(frozen=True)
class Notice:
    """A domain starts over, in a new order.

    Attributes:
        domain: its name.
        epoch: the pass that begins, counted from 0; so 1 when all was seen once.
        step: the step, counted from 0, whose batch holds the first sequence of that pass.
    """

    domain: str
    epoch: int
    step: int


class Mixture:
    """Global batches of sequences from several domains, with weights that may change every step.

    A step's domains are a function of seed, step and weights. A domain gives its sequences in an
    order that is a function of seed, name and epoch, each exactly once an epoch, and then again
    in another order, within the same batch if need be.

    Args:
        sizes: sequences in each domain; the order of the names does not matter.
        seed: at least 0.
        batch: sequences a step, over all ranks and accumulated gradients.

    Raises:
        ShearlingError: no domains, a domain without sequences, or numbers out of range.
    """

    def __init__(self, sizes: Mapping[str, int], *, seed: int, batch: int) -> None:
        """Begin at step 0 with nothing taken."""
        shares(sizes)  # refuses empty domains
        if batch < 1 or seed < 0:
            raise ShearlingError(
                f"a batch of {batch} with the seed {seed} was given, but at least 1 and at least "
                "0 were expected."
            )
        self.sizes = {name: int(sizes[name]) for name in sorted(sizes)}
        self.seed, self.batch = int(seed), int(batch)
        self.notices: list[Notice] = []
        self._step = 0
        self._taken = dict.fromkeys(self.sizes, 0)
        self._orders: dict[str, Order] = {}

    def next(self, weights: Mapping[str, float]) -> list[tuple[str, int]]:
        """The next global batch, the same on every rank; advances the step.

        A domain of weight w gets ⌊w·batch⌋ or ⌈w·batch⌉ of the slots, w·batch on average; one of
        weight 0 gets none.

        Args:
            weights: share of each domain, at least 0, summing to 1.

        Returns:
            Domain and row, from 0 to its size, for each of ``batch`` slots; slots are in random
            order, so that any split of them over ranks is fair.

        Raises:
            ShearlingError: weights that are no shares of these domains; nothing is advanced.
        """
        drawn = draw(checked(weights, self.sizes), self.seed, self._step, self.batch)
        self.notices = []
        slots: list[tuple[str, int]] = [("", 0)] * self.batch
        for number, name in enumerate(self.sizes):
            places = np.flatnonzero(drawn == number)
            for place, row in zip(places.tolist(), self._take(name, len(places)), strict=True):
                slots[place] = (name, row)
        self._step += 1
        return slots

    def peek(self, weights: Mapping[str, float]) -> list[tuple[str, int]]:
        """What ``next`` would return; nothing is advanced."""
        state, notices = self.state(), self.notices
        try:
            return self.next(weights)
        finally:
            self.load(state)
            self.notices = notices

    def state(self) -> dict[str, Any]:
        """All that is needed to go on exactly, as JSON can hold it."""
        return {
            "seed": self.seed,
            "batch": self.batch,
            "sizes": dict(self.sizes),
            "step": self._step,
            "taken": dict(self._taken),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, whatever the number of ranks it was saved on.

        Raises:
            ShearlingError: a state of other sizes, seed or batch, or no state at all.
        """
        for name, mine in (("seed", self.seed), ("batch", self.batch), ("sizes", self.sizes)):
            if state.get(name) != mine:
                raise ShearlingError(
                    f"the data order was saved with {name} {state.get(name)}, but this run has "
                    f"{mine}; resume with the data, seed and batch that the run began with."
                )
        step, taken = state.get("step", -1), state.get("taken")
        counts = dict(taken) if isinstance(taken, Mapping) else {}
        whole = all(isinstance(count, int) and count >= 0 for count in (step, *counts.values()))
        if not whole or set(counts) != set(self.sizes) or sum(counts.values()) != step * self.batch:
            raise ShearlingError(
                f"the data order was saved as step {step} with {taken} taken, which does not add "
                f"up to batches of {self.batch}; resume from another checkpoint."
            )
        self._step = int(step)
        self._taken = {name: counts[name] for name in self.sizes}
        self.notices = []

    def _take(self, name: str, count: int) -> list[int]:
        """The next ``count`` rows of a domain, over as many epochs as that takes."""
        size, first = self.sizes[name], self._taken[name]
        last = first + count
        begun = [e * size for e in range(-(-first // size), -(-last // size))]
        self.notices += [Notice(name, start // size, self._step) for start in begun if start]
        rows: list[int] = []
        for start, end in pairwise(sorted({first, *begun, last})):
            rows += self._order(name, start // size)(np.arange(start, end) % size).tolist()
        self._taken[name] = last
        return rows

    def _order(self, name: str, epoch: int) -> Order:
        held = self._orders.get(name)
        if held is None or held.epoch != epoch:
            held = self._orders[name] = Order(self.sizes[name], self.seed, name, epoch)
        return held


def draw(weights: Mapping[str, float], seed: int, step: int, batch: int) -> np.ndarray:
    """The domain, by its number among ``weights``, of each of ``batch`` slots of a step (int64).

    Systematic sampling: one uniform number u, and the points (u + j)/batch for all slots j, each
    of which lies in one domain's part of the unit interval. Every domain has the share w exactly
    in expectation, as with independent draws, but its count in a batch never misses w·batch by a
    whole slot, where independent draws have a standard deviation of √(w·(1−w)·batch).

    Args:
        weights: at least 0, summing to 1.
        seed: at least 0.
        step: counted from 0.
        batch: slots.
    """
    # Philox and SeedSequence have streams that NumPy promises not to change (NEP 19); those of
    # Generator's methods may change with its version. So we shuffle and scale raw words ourselves.
    words = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(_STEPS, step)))
    raw = words.random_raw(batch + 1)
    points = (float(raw[0] >> np.uint64(11)) * 2.0**-53 + np.arange(batch)) / batch
    live = [number for number, weight in enumerate(weights.values()) if weight > 0]
    # Ends of all parts but the last, which takes what rounding leaves: a part of no width is not
    # among them, so that a point on a boundary cannot fall into it.
    values = list(weights.values())
    ends = [math.fsum(values[: number + 1]) for number in live[:-1]]
    domains = np.asarray(live)[np.searchsorted(ends, points, side="right")]
    return domains[np.argsort(raw[1:], kind="stable")]


class Order:
    """A permutation of a domain's rows in constant memory: a Feistel network with cycle walking.

    A number of b bits, just enough for all rows, is split into two parts, and each round adds
    (exclusive or) a hash of one part to the other, in turns. A round is its own inverse, hence
    all rounds together are a bijection of the 2^b numbers; following it from a row until it comes
    back to a row is one of the rows (Black and Rogaway, "Ciphers with arbitrary finite domains",
    2002). 2^b is less than twice the size, so that walks take two turns or fewer on average.

    Args:
        size: rows, at least 1.
        seed: at least 0.
        domain: its name; each has an order of its own.
        epoch: counted from 0; each has an order of its own.
    """

    def __init__(self, size: int, seed: int, domain: str, epoch: int) -> None:
        """Derive the keys; nothing of the size is computed."""
        self.size, self.epoch = size, epoch
        bits = (size - 1).bit_length()
        self._low, self._high = bits - bits // 2, bits // 2
        name = np.frombuffer(hashlib.sha256(domain.encode("utf-8")).digest(), "<u4").tolist()
        keys = np.random.SeedSequence(seed, spawn_key=(_ROWS, *name, epoch))
        self._keys = keys.generate_state(_ROUNDS, np.uint64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The rows (int64) at ``positions``, whole numbers of any shape from 0 to the size."""
        rows = self._encrypt(np.asarray(positions).astype(np.uint64))
        while (outside := rows >= self.size).any():
            rows[outside] = self._encrypt(rows[outside])
        return rows.astype(np.int64)

    def _encrypt(self, numbers: np.ndarray) -> np.ndarray:
        low = np.uint64(self._low)
        low_mask, high_mask = (np.uint64((1 << bits) - 1) for bits in (self._low, self._high))
        left, right = numbers >> low, numbers & low_mask
        for number, key in enumerate(self._keys):
            if number % 2:
                left = left ^ (_hash(right ^ key) & high_mask)
            else:
                right = right ^ (_hash(left ^ key) & low_mask)
        return left << low | right


def _hash(x: np.ndarray) -> np.ndarray:
    """64 well-mixed bits of each number."""
    for factor in _MIX:
        x = (x ^ (x >> np.uint64(33))) * factor
    return x ^ (x >> np.uint64(33))
