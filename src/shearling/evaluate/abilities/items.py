"""One question with the one answer that is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

END = "\n"  # ends every answer


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt that shows by example what is asked, and what has to follow.

    Attributes:
        prompt: ends without a space.
        answer: of one line; it begins with a space, and :data:`END` follows it.
    """

    prompt: str
    answer: str


@dataclass(frozen=True)
class Ability:
    """A kind of items.

    Attributes:
        says: what it measures, for the docs.
        make: an item, from draws and its number, by which lengths and forms take turns.
        count: how many are asked.
    """

    name: str
    says: str
    make: Callable[[Random, int], Item]
    count: int

    def items(self, seed: int, limit: int | None = None) -> list[Item]:
        """The first so many. Each follows from the seed and its number alone."""
        count = self.count if limit is None else min(limit, self.count)
        return [
            self.make(Random(f"shearling {seed} {self.name} {number}"), number)
            for number in range(count)
        ]
