"""From verdicts in both orders to a win rate with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shearling.evaluate.intervals import wilson
from shearling.judge.template import Verdict

Outcome = Literal["win", "tie", "loss"]


@dataclass(frozen=True)
class Pair:
    """What the judge said of one prompt: with A's answer shown first, and with B's first.

    None stands for a reply that could not be read. ``identical`` answers were not shown.
    """

    a_first: Verdict | None = None
    b_first: Verdict | None = None
    identical: bool = False

    @property
    def outcome(self) -> Outcome | None:
        """For A: a win or a loss only where both orders agree; None where one is unreadable."""
        if self.identical:
            return "tie"
        if self.a_first is None or self.b_first is None:
            return None
        if (self.a_first, self.b_first) == ("first", "second"):
            return "win"
        return "loss" if (self.a_first, self.b_first) == ("second", "first") else "tie"


@dataclass(frozen=True)
class Tally:
    """Counts over prompts, and what follows from them.

    Attributes:
        prompts: all of them, of which ``unreadable`` had a verdict that could not be read and count
            nowhere else.
        identical: ties because both answers are the same text.
        unreadable_verdicts: single replies, two a prompt at most.
        first_preferred: share of the verdicts for one side that were for the answer shown first;
            0.5 is a judge without position bias. None without such verdicts.
        win_rate: of A, ties counting half; None where nothing could be read.
        interval: its 95 % interval.
    """

    prompts: int
    wins: int
    ties: int
    losses: int
    unreadable: int
    identical: int
    unreadable_verdicts: int
    first_preferred: float | None
    win_rate: float | None
    interval: tuple[float, float] | None


def tally(pairs: Sequence[Pair]) -> Tally:
    """Count."""
    outcomes = [pair.outcome for pair in pairs]
    wins, ties, losses = (outcomes.count(kind) for kind in ("win", "tie", "loss"))
    read = wins + ties + losses
    verdicts = [v for pair in pairs if not pair.identical for v in (pair.a_first, pair.b_first)]
    first, second = verdicts.count("first"), verdicts.count("second")
    rate = (wins + ties / 2) / read if read else None
    return Tally(
        prompts=len(pairs), wins=wins, ties=ties, losses=losses,
        unreadable=outcomes.count(None), identical=sum(pair.identical for pair in pairs),
        unreadable_verdicts=verdicts.count(None),
        first_preferred=first / (first + second) if first + second else None,
        win_rate=rate, interval=None if rate is None else wilson(rate, read),
    )  # fmt: skip
