"""Several texts with names and shares: what users write, and how windows are dealt out."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shearling.data.sources import (
    TextSource,
    by_largest_remainder,
    dealt,
    described_sources,
    mixed_order,
    parse_sources,
    settled_sources,
)
from shearling.engine.moments import held_rows
from shearling.errors import ShearlingError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Some files, among them such as hold the signs themselves."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").mkdir()
    for name in ("c4.jsonl", "talks.jsonl", "a=b.jsonl", "c4.jsonl:0.5", "web=odd:1.txt"):
        (tmp_path / name).write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["c4.jsonl"], [("", "c4.jsonl", 1)]),
        (["web=c4.jsonl"], [("web", "c4.jsonl", 1)]),
        (["talks.jsonl:1"], [("", "talks.jsonl", 1)]),
        (["web=c4.jsonl", "chat=src"], [("web", "c4.jsonl", 0.5), ("chat", "src", 0.5)]),
        (["c4.jsonl", "src/"], [("c4", "c4.jsonl", 0.5), ("src", "src", 0.5)]),
        (
            ["web=talks.jsonl:0.5", "chat=a=b.jsonl:0.3", "code=src/:0.2"],
            [("web", "talks.jsonl", 0.5), ("chat", "a=b.jsonl", 0.3), ("code", "src", 0.2)],
        ),
        # What exists is a path, whatever it is called.
        (["a=b.jsonl"], [("", "a=b.jsonl", 1)]),
        (["c4.jsonl:0.5"], [("", "c4.jsonl:0.5", 1)]),
        (["web=odd:1.txt"], [("", "web=odd:1.txt", 1)]),
        (["x=c4.jsonl:0.5", "y=c4.jsonl:0.5:.5"], None),  # one with a share, one without
        (["x=c4.jsonl:0.5:5e-1", "y=src:.5"], [("x", "c4.jsonl:0.5", 0.5), ("y", "src", 0.5)]),
    ],
)  # fmt: skip
def test_what_users_write(here: Path, texts: list[str], expected: list[tuple[str, str, float]]):
    if expected is None:
        with pytest.raises(ShearlingError, match="y have shares .0.5 = 0.5., but x has none"):
            parse_sources(texts)
        return
    assert [(one.name, str(one.file), one.share) for one in parse_sources(texts)] == expected


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["web=nothing.jsonl:0.5"], "There is no text at nothing.jsonl; give an existing"),
        (["nothing.jsonl"], "There is no text at nothing.jsonl; give an existing"),
        (["web="], "There is no text at 'web='"),
        (["we b=c4.jsonl"], "source called 'we b', but a name has letters"),
        (["=c4.jsonl"], "source called ''"),
        (["web=talks.jsonl:half"], "gives 'half' as a share, but a number was"),
        (["web=talks.jsonl:0", "chat=src:1"], "web has share 0, but a share is above 0"),
        (["web=talks.jsonl:-0.5", "chat=src:1.5"], "web has share -0.5"),
        (["web=talks.jsonl:1e999"], "web has share inf"),
        (["web=talks.jsonl", "Web=src"], "two calibration sources are called 'Web' (talks"),
        (["talks.jsonl", "talks.jsonl"], "two calibration sources are called 'talks'"),
        (["a=talks.jsonl:0.5", "b=src:0.3", "c=c4.jsonl"],
         "a, b have shares (0.5 + 0.3 = 0.8), but c has none; give c 0.2, or leave out every"),
        (["a=talks.jsonl:0.4", "b=src", "c=c4.jsonl"], "give b and c 0.3 each, or"),
        (["a=talks.jsonl:1.5", "b=src"], "b has none; give all a share, or"),
        (["a=talks.jsonl:0.5", "b=src:0.4"],
         "sum to 0.9 (0.5 + 0.4), but 1 was expected; in the same proportion, give a 0.5556, b "
         "0.4444, or"),
        (["a=talks.jsonl:0.5"], "give a 1, or"),
        (["a=talks.jsonl:0.5", "b=src:0.500002"], "sum to 1"),
    ],
)  # fmt: skip
def test_what_is_refused(here: Path, texts: list[str], said: str) -> None:
    with pytest.raises(ShearlingError, match=re.escape(said)):
        parse_sources(texts)


def test_what_sums_to_one_but_for_rounding_is_taken(here: Path) -> None:
    parsed = parse_sources(["a=talks.jsonl:0.333333", "b=src:0.333333", "c=c4.jsonl:0.333334"])
    assert sum(dealt(parsed, 64)) == 64


def test_no_source_is_refused() -> None:
    with pytest.raises(ShearlingError, match="no calibration source was given"):
        settled_sources([])


def named(*shares: float) -> list[TextSource]:
    return [TextSource(Path("x.txt"), f"s{n}", share) for n, share in enumerate(shares)]


def test_a_source_without_a_window_is_refused() -> None:
    with pytest.raises(
        ShearlingError, match=r"of 16 .* none would be of s1.* 0.02.*--samples 50 or"
    ):
        dealt(named(0.98, 0.02), 16)
    assert dealt(named(0.98, 0.02), 50) == [49, 1]


def test_shares_are_what_is_written_and_not_what_a_float_holds() -> None:
    """0.1 + 0.2 of 10 windows: floats would give the last window to another source."""
    assert dealt(named(0.7, 0.1, 0.2), 10) == [7, 1, 2]
    assert dealt(named(*[1 / 3] * 3), 64) == [22, 21, 21]


@given(weights=st.lists(st.integers(1, 50), min_size=1, max_size=6), seats=st.integers(1, 200))
def test_largest_remainder(weights: list[int], seats: int) -> None:
    """Against its definition: quotas rounded down, and the largest remainders up."""
    total = sum(weights)
    counts = by_largest_remainder([Fraction(w, total) for w in weights], seats)
    assert sum(counts) == seats
    floors = [seats * w // total for w in weights]
    remainders = [seats * w % total for w in weights]
    up = [count - floor for count, floor in zip(counts, floors, strict=True)]
    assert set(up) <= {0, 1}
    assert sum(up) == seats - sum(floors)
    least_up = min((r for r, one in zip(remainders, up, strict=True) if one), default=math.inf)
    assert all(r <= least_up for r, one in zip(remainders, up, strict=True) if not one)


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=5), seed=st.integers(0, 2**63 - 1))
def test_the_order_mixes_evenly(counts: list[int], seed: int) -> None:
    """Beginnings of all windows, of those held out and of the others hold each by its share."""
    order, total = mixed_order(counts, seed), sum(counts)
    assert order == mixed_order(counts, seed)
    assert [order.count(source) for source in range(len(counts))] == counts
    held = held_rows(total).tolist()
    apart = [[s for s, h in zip(order, held, strict=True) if h is kind] for kind in (True, False)]
    for row in (order, *apart):
        for size in range(1, len(row) + 1):
            for source, count in enumerate(counts):
                assert abs(row[:size].count(source) - size * count / total) < 2


def test_no_period_meets_every_second_window() -> None:
    order = mixed_order([32, 32], 0)
    assert 10 <= sum(order[::2]) <= 22
    assert order != mixed_order([32, 32], 1)


def test_what_results_say() -> None:
    (one,) = settled_sources(Path("there/c4.jsonl"))
    assert described_sources([one], 64) == {"file": "c4.jsonl"}
    assert described_sources(named(0.75, 0.25), 8)["sources"][1] == {
        "name": "s1", "file": "x.txt", "share": 0.25, "windows": 2,
    }  # fmt: skip
