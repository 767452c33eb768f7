"""A benchmark on a budget, with a clock that only the timed runs move."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import pytest

from shearling.evaluate import budget as budgets
from shearling.evaluate import speed
from shearling.evaluate.budget import TimeBudget
from shearling.evaluate.engines import Cell, Timing


@dataclass
class Clock:
    now: float = 0.0

    def perf_counter(self) -> float:
        return self.now


@dataclass
class Slow:
    """A model that takes a second for a prompt and ``step`` seconds for a token."""

    clock: Clock
    step: float
    threads: int | None = None
    weights: str = "float32"

    def parts(self, cell: Cell, *, fresh: bool) -> Generator[None, None, Timing]:
        self.clock.now += 1 + self.step * cell.new
        yield
        return Timing(1.0, self.step * cell.new, cell.new, None)


@pytest.mark.parametrize(
    ("step", "seconds", "timed", "notes"),
    [
        (0.1, 1000, [(1, 32, 3), (8, 32, 3)], 0),
        (0.1, 30, [(1, 32, 1), (8, 32, 1)], 2),  # 2.8 s of warm-up, then 8.4 s a round
        (1.0, 60, [(1, 9, 1), (8, 9, 1)], 2),
        (100.0, 90, [(1, 4, 1)], 2),  # not even the first cell: it is timed all the same
    ],
)
def test_rounds_and_tokens_follow_the_budget(
    monkeypatch: pytest.MonkeyPatch, step: float, seconds: float,
    timed: list[tuple[int, int, int]], notes: int,
) -> None:  # fmt: skip
    clock = Clock()
    for module in (budgets, speed):
        monkeypatch.setattr(module, "time", clock)
    budget = TimeBudget(seconds)
    cells = (Cell(1, 128, 32), Cell(8, 128, 32))
    heard: list[tuple[float, float]] = []
    measured = list(
        speed.measure(
            [Slow(clock, step), Slow(clock, step)], cells, 3, budget=budget,
            progress=lambda stage, done, total: heard.append((done, total)),
        )
    )  # fmt: skip
    assert [(m.cell.batch, m.cell.new, len(m.timings[0])) for m in measured] == timed
    assert len(budget.notes) == notes
    assert heard[-1][0] == heard[-1][1]
    if step < 100:
        assert clock.now <= seconds
