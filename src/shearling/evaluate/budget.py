"""A benchmark that has so many seconds: fewer rounds, fewer tokens, and what that made of it.

On a machine that does other work as well, two models in turns can take ten times as long as on a
quiet one: each step waits for the thread that got its core last.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from shearling.evaluate.engines import Cell, Timing

PROBED = 4  # tokens after the prompt in the first, untimed run of a cell


@dataclass
class TimeBudget:
    """Seconds for a grid, shared out cell by cell by what a first short run of each takes.

    Attributes:
        seconds: for all of it.
        notes: sentences on what was left out.
    """

    seconds: float
    notes: list[str] = field(default_factory=list)
    _begun: float = field(default_factory=lambda: time.perf_counter())

    @property
    def left(self) -> float:
        """Seconds that are left, negative once it is used up."""
        return self.seconds - (time.perf_counter() - self._begun)

    def spent(self, cell: Cell) -> bool:
        """Whether nothing is left for a cell, which is then noted as left out."""
        if self.left > 0:
            return False
        self.notes.append(
            f"{_named(cell)} was left out: the {self.seconds:g} seconds given were used up."
        )
        return True

    def probe(self, cell: Cell) -> Cell:
        """The short run that stands for a warm-up and tells what a round takes."""
        return replace(cell, new=min(PROBED, cell.new))

    def fit(
        self, cell: Cell, repeats: int, probed: Sequence[Timing], share: float
    ) -> tuple[Cell, int]:
        """A cell and a number of rounds that take about ``share`` seconds; at least one round.

        Args:
            cell: as it was asked for.
            repeats: rounds asked for.
            probed: of every model.
            share: seconds for the rounds.
        """
        prefill = sum(one.prefill_seconds for one in probed)
        step = sum(one.decode_seconds / one.steps for one in probed)
        new = cell.new
        if prefill + new * step > share:
            new = max(min(PROBED, new), math.floor((share - prefill) / step))
        rounds = max(1, min(repeats, math.floor(share / (prefill + new * step))))
        if (new, rounds) != (cell.new, repeats):
            self.notes.append(
                f"{_named(cell)} was timed in {rounds} of {repeats} rounds of {new} of {cell.new} "
                f"new tokens, to keep within the {self.seconds:g} seconds given."
            )
        return replace(cell, new=new), rounds


def _named(cell: Cell) -> str:
    return f"Batch {cell.batch} with prompts of {cell.prompt} tokens"
