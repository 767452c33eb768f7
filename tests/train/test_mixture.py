"""The order of the data: each row once an epoch, the same on any number of ranks, resumable."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shearling.errors import ShearlingError
from shearling.train.mixture import Mixture, Notice, Order, draw

SIZES = {"web": 11, "code": 5, "books": 1}
EVEN = {"web": 0.5, "code": 0.25, "books": 0.25}
# What seed 5 gave when this was written.
PINNED = [("web", 1), ("books", 0), ("code", 2), ("web", 6), ("books", 0), ("web", 5)]
PINNED_ROWS = [77123533, 496100719, 331042951, 309144310]

all_sizes = st.dictionaries(
    st.text(min_size=1, max_size=4), st.integers(1, 40), min_size=1, max_size=5
)


@st.composite
def shares(draw: st.DrawFn, names: list[str]) -> dict[str, float]:
    """Weights with zeros among them."""
    raw = draw(st.lists(st.integers(0, 9), min_size=len(names), max_size=len(names)).filter(any))
    return {name: value / sum(raw) for name, value in zip(names, raw, strict=True)}


def take(mixture: Mixture, steps: int, weights: dict[str, float]) -> list[tuple[str, int]]:
    return [slot for _ in range(steps) for slot in mixture.next(weights)]


# --- rows of a domain ----------------------------------------------------------------------------


@given(st.integers(1, 3000), st.integers(0, 2**70), st.text(max_size=5), st.integers(0, 2**40))
def test_an_order_has_every_row_once(size: int, seed: int, domain: str, epoch: int) -> None:
    rows = Order(size, seed, domain, epoch)(np.arange(size))
    assert sorted(rows.tolist()) == list(range(size))


@given(st.integers(2**32, 2**50), st.integers(0, 9), st.data())
def test_a_large_order_has_no_row_twice(size: int, seed: int, data: st.DataObject) -> None:
    """Where no one can list all rows: distinct positions have distinct rows within the size."""
    positions = data.draw(st.lists(st.integers(0, size - 1), unique=True, min_size=2, max_size=40))
    rows = Order(size, seed, "web", 0)(np.array(positions))
    assert len(set(rows.tolist())) == len(positions)
    assert rows.min() >= 0
    assert rows.max() < size


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_orders_are_as_likely(size: int) -> None:
    """Pearson's statistic over all permutations, for fixed seeds; 4.5 deviations is one in 1e5."""
    kinds = math.factorial(size)
    expected = 60 if size < 5 else 20  # of each order; with 5 or more the statistic is chi-squared
    found = Counter(
        tuple(Order(size, seed, "web", 0)(np.arange(size))) for seed in range(expected * kinds)
    )
    statistic = sum(
        (found[order] - expected) ** 2 / expected for order in permutations(range(size))
    )
    assert abs(statistic - (kinds - 1)) < 4.5 * math.sqrt(2 * (kinds - 1))


def test_neighbours_are_scattered() -> None:
    """Rows that follow one another in an order lie as far apart as in a random one: a third."""
    rows = Order(100_003, 3, "web", 0)(np.arange(20_000))
    assert abs(np.abs(np.diff(rows)).mean() / 100_003 - 1 / 3) < 0.01
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(np.arange(20_000), rows)[0, 1]) < 0.03


def test_each_seed_domain_and_epoch_has_its_own_order() -> None:
    orders = {
        tuple(Order(40, seed, domain, epoch)(np.arange(40)))
        for seed in range(3)
        for domain in ("a", "b", "ab", "")
        for epoch in range(3)
    }
    assert len(orders) == 36


# --- which domain --------------------------------------------------------------------------------


@given(st.data(), st.integers(1, 70), st.integers(0, 5), st.integers(0, 10**6))
def test_counts_miss_their_share_by_less_than_one(
    data: st.DataObject, batch: int, seed: int, step: int
) -> None:
    weights = data.draw(shares(list("abcde")))
    found = Counter(draw(weights, seed, step, batch).tolist())
    for number, weight in enumerate(weights.values()):
        assert abs(found[number] - weight * batch) < 1 + 1e-9
        assert weight > 0 or not found[number]


def test_a_domain_without_weight_is_never_drawn() -> None:
    """Also at the ends, and where the sum falls short of 1 (by far more than rounding)."""
    weights = {"a": 0.0, "b": 0.1, "c": 0.0, "d": 0.2, "e": 0.5, "f": 0.0}
    for step in range(500):
        assert set(draw(weights, 1, step, 3).tolist()) <= {1, 3, 4}


def test_shares_are_exact_on_average() -> None:
    """Weights far below one slot a batch are met over many steps; the deviation is a binomial's."""
    weights, steps, batch = {"a": 0.03, "b": 0.17, "c": 0.8}, 4000, 4
    found = Counter(n for step in range(steps) for n in draw(weights, 7, step, batch).tolist())
    for number, weight in enumerate(weights.values()):
        part = (weight * batch) % 1
        deviation = math.sqrt(part * (1 - part) * steps)
        assert abs(found[number] - weight * batch * steps) < 4.5 * deviation


def test_slots_are_in_random_order() -> None:
    """Every slot has every domain by its weight, so that a split over ranks is fair."""
    weights, steps = {"a": 0.25, "b": 0.75}, 4000
    rows = np.array([draw(weights, 2, step, 8) for step in range(steps)])
    assert np.abs((rows == 0).mean(0) - 0.25).max() < 4.5 * math.sqrt(0.25 * 0.75 / steps)


# --- batches -------------------------------------------------------------------------------------


def naive(
    sizes: dict[str, int], seed: int, batch: int, mixes: list[dict[str, float]]
) -> tuple[list[list[tuple[str, int]]], list[list[Notice]]]:
    """One slot at a time, each domain an endless iterator over epochs."""
    taken = dict.fromkeys(sizes, 0)
    batches, notices = [], []
    for step, weights in enumerate(mixes):
        names = sorted(sizes)
        slots, said = [], []
        for number in draw({n: weights[n] for n in names}, seed, step, batch).tolist():
            name = names[number]
            epoch, place = divmod(taken[name], sizes[name])
            if epoch and place == 0:
                said.append(Notice(name, epoch, step))
            slots.append((name, int(Order(sizes[name], seed, name, epoch)(np.array([place]))[0])))
            taken[name] += 1
        batches.append(slots)
        notices.append(said)
    return batches, notices


@settings(max_examples=60, deadline=None)
@given(all_sizes, st.integers(0, 99), st.integers(1, 30), st.data())
def test_batches_equal_those_of_a_loop(
    sizes: dict[str, int], seed: int, batch: int, data: st.DataObject
) -> None:
    mixes = data.draw(st.lists(shares(list(sizes)), min_size=1, max_size=6))
    mixture = Mixture(sizes, seed=seed, batch=batch)
    batches, notices = naive(sizes, seed, batch, mixes)
    for weights, expected, said in zip(mixes, batches, notices, strict=True):
        assert mixture.next(weights) == expected
        assert sorted(mixture.notices, key=str) == sorted(said, key=str)


@settings(max_examples=50, deadline=None)
@given(all_sizes, st.integers(0, 99), st.integers(1, 30), st.data())
def test_no_row_again_before_its_domain_is_exhausted(
    sizes: dict[str, int], seed: int, batch: int, data: st.DataObject
) -> None:
    mixture = Mixture(sizes, seed=seed, batch=batch)
    seen: dict[str, list[int]] = {name: [] for name in sizes}
    for weights in data.draw(st.lists(shares(list(sizes)), min_size=1, max_size=9)):
        before = {name: len(rows) for name, rows in seen.items()}
        for name, row in mixture.next(weights):
            seen[name].append(row)
        begun = Counter(notice.domain for notice in mixture.notices)
        for name, size in sizes.items():
            passes = [-(-count // size) for count in (before[name], len(seen[name]))]
            assert begun[name] == max(passes[1], 1) - max(passes[0], 1)
    for name, size in sizes.items():
        for start in range(0, len(seen[name]), size):
            epoch = seen[name][start : start + size]
            assert len(set(epoch)) == len(epoch)
            assert set(epoch) <= set(range(size))
    assert mixture.state()["taken"] == {name: len(rows) for name, rows in seen.items()}


def test_a_domain_goes_on_within_the_batch() -> None:
    mixture = Mixture({"a": 3, "b": 50}, seed=0, batch=10)
    rows = mixture.next({"a": 1.0, "b": 0.0})
    assert {name for name, _ in rows} == {"a"}
    assert sorted(row for _, row in rows[:3]) == sorted(row for _, row in rows[3:6]) == [0, 1, 2]
    assert mixture.notices == [Notice("a", epoch, 0) for epoch in (1, 2, 3)]
    mixture.next({"a": 0.0, "b": 1.0})
    assert mixture.notices == []


def test_a_pass_that_ends_with_a_batch_is_announced_when_the_next_begins() -> None:
    mixture = Mixture({"a": 8}, seed=0, batch=8)
    first = mixture.next({"a": 1.0})
    assert mixture.notices == []
    second = mixture.next({"a": 1.0})
    assert mixture.notices == [Notice("a", 1, 1)]
    assert sorted(first) == sorted(second)
    assert first != second


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 99), st.sampled_from([4, 8, 24]), st.data())
def test_ranks_share_one_batch(seed: int, batch: int, data: st.DataObject) -> None:
    """Each of 1, 2 or 4 ranks computes the batch itself and takes its slots."""
    mixes = data.draw(st.lists(shares(list(SIZES)), min_size=1, max_size=5))
    alone = Mixture(SIZES, seed=seed, batch=batch)
    whole = [Counter(alone.next(weights)) for weights in mixes]
    for ranks in (1, 2, 4):
        parts = [Mixture(SIZES, seed=seed, batch=batch) for _ in range(ranks)]
        for weights, expected in zip(mixes, whole, strict=True):
            each = batch // ranks
            taken = [
                part.next(weights)[rank * each : (rank + 1) * each]
                for rank, part in enumerate(parts)
            ]
            assert sum(map(Counter, taken), Counter()) == expected


def test_the_order_of_the_names_does_not_matter() -> None:
    one = Mixture(SIZES, seed=4, batch=6)
    two = Mixture(dict(reversed(SIZES.items())), seed=4, batch=6)
    assert take(one, 9, EVEN) == take(two, 9, dict(reversed(EVEN.items())))


def test_seeds_differ() -> None:
    runs = [tuple(take(Mixture(SIZES, seed=seed, batch=6), 3, EVEN)) for seed in range(9)]
    assert len(set(runs)) == 9


def test_another_process_draws_the_same() -> None:
    """Nothing depends on the hashes of strings, which differ from process to process."""
    code = (
        "from shearling.train.mixture import Mixture\n"
        f"m = Mixture({SIZES!r}, seed=5, batch=6)\n"
        f"print([m.next({EVEN!r}) for _ in range(4)])\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    mixture = Mixture(SIZES, seed=5, batch=6)
    assert out.stdout.strip() == str([mixture.next(EVEN) for _ in range(4)])


def test_the_order_stays_from_release_to_release() -> None:
    """A run that is resumed with a later version has to go on in the same order."""
    mixture = Mixture(SIZES, seed=5, batch=6)
    assert mixture.next(EVEN) == PINNED
    assert Order(10**9, 5, "web", 2)(np.arange(4)).tolist() == PINNED_ROWS


# --- state ---------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(all_sizes, st.integers(0, 99), st.integers(1, 20), st.data())
def test_a_state_goes_on_exactly(
    sizes: dict[str, int], seed: int, batch: int, data: st.DataObject
) -> None:
    mixes = data.draw(st.lists(shares(list(sizes)), min_size=1, max_size=8))
    whole = Mixture(sizes, seed=seed, batch=batch)
    expected = [(whole.next(weights), whole.notices) for weights in mixes]
    for stop in range(len(mixes) + 1):
        first = Mixture(sizes, seed=seed, batch=batch)
        for weights in mixes[:stop]:
            first.next(weights)
        second = Mixture(dict(reversed(sizes.items())), seed=seed, batch=batch)
        second.load(json.loads(json.dumps(first.state())))
        found = [(second.next(weights), second.notices) for weights in mixes[stop:]]
        assert found == expected[stop:]
        assert second.state() == whole.state()


def test_a_state_goes_back() -> None:
    """Loading is complete: nothing of what was done since stays behind."""
    mixture = Mixture(SIZES, seed=1, batch=7)
    take(mixture, 2, EVEN)
    state = mixture.state()
    first = take(mixture, 9, EVEN)
    mixture.load(state)
    assert mixture.notices == []
    assert take(mixture, 9, EVEN) == first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2}, "saved with seed 2, but this run has 1"),
        ({"batch": 8}, "saved with batch 8, but this run has 7"),
        ({"sizes": {**SIZES, "web": 12}}, "saved with sizes .*12.* but this run has .*11"),
        ({"sizes": {"web": 11, "code": 5}}, "saved with sizes"),
        ({"sizes": None}, "saved with sizes"),
        ({"step": 3}, "step 3 .* add up to batches of 7"),
        ({"step": "2"}, "add up"),
        ({"step": -2}, "add up"),
        ({"taken": {"web": 14, "code": 0}}, "add up"),
        ({"taken": {"web": 15, "code": -1, "books": 0}}, "add up"),
        ({"taken": {"web": 13.0, "code": 1, "books": 0}}, "add up"),
        ({"taken": 14}, "add up"),
    ],
)
def test_a_state_of_another_run(changes: dict[str, Any], message: str) -> None:
    mixture = Mixture(SIZES, seed=1, batch=7)
    take(mixture, 2, EVEN)
    state = mixture.state()
    with pytest.raises(ShearlingError, match=message):
        mixture.load(state | changes)
    assert mixture.state() == state
    for name in state:
        with pytest.raises(ShearlingError):
            mixture.load({key: value for key, value in state.items() if key != name})


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (EVEN | {"code": -0.25, "web": 1.0}, "code has the weight -0.25"),
        (EVEN | {"code": math.nan}, "code has the weight nan"),
        (EVEN | {"code": math.inf}, "code has the weight inf"),
        (EVEN | {"code": "much"}, "code has the weight much"),
        (EVEN | {"code": 0.25 + 2e-6}, "sum to 1.000002, but 1"),
        ({"web": 0.5, "code": 0.5}, "lack books"),
        (EVEN | {"music": 0.0}, "name music"),
        ({}, "lack books, code, web"),
    ],
)
def test_weights_that_are_none(weights: dict[str, Any], message: str) -> None:
    mixture = Mixture(SIZES, seed=0, batch=4)
    before = mixture.state()
    with pytest.raises(ShearlingError, match=message):
        mixture.next(weights)
    assert mixture.state() == before


def test_weights_that_nearly_sum_to_1() -> None:
    mixture = Mixture(SIZES, seed=0, batch=4)
    assert len(mixture.next(EVEN | {"code": 0.25 - 9e-7})) == 4


@pytest.mark.parametrize(
    ("sizes", "seed", "batch", "message"),
    [
        ({"web": 3, "code": 0}, 0, 1, "code has no sequences"),
        ({}, 0, 1, "no domains"),
        ({"web": 3}, -1, 1, "seed -1"),
        ({"web": 3}, 0, 0, "batch of 0"),
    ],
)
def test_impossible_mixtures(sizes: dict[str, int], seed: int, batch: int, message: str) -> None:
    with pytest.raises(ShearlingError, match=message):
        Mixture(sizes, seed=seed, batch=batch)
