"""Blocks of several kinds: of each kind one has to stay, whatever else goes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

Kinds = Sequence[str]  # of each block; empty where blocks are all alike


def lost(kinds: Kinds, removed: Collection[int]) -> str | None:
    """A kind of which the removal of some blocks leaves none; None if there is no such."""
    left = {kind for block, kind in enumerate(kinds) if block not in removed}
    return min(set(kinds) - left, default=None)


def one_by_one(kinds: Kinds, order: Iterable[int], removed: Collection[int] = ()) -> list[int]:
    """Blocks of ``order`` that can go one after the other, each that is the last of its kind left.

    Args:
        kinds: of each block.
        order: in which they are to go.
        removed: those that are gone already.
    """
    left = Counter(kind for block, kind in enumerate(kinds) if block not in removed)
    going = []
    for block in order:
        if kinds:
            if left[kinds[block]] == 1:
                continue
            left[kinds[block]] -= 1
        going.append(block)
    return going


def most_removable(kinds: Kinds, depth: int, protected: Collection[int]) -> int:
    """How many of ``depth`` blocks can go beside those that are protected."""
    return len(one_by_one(kinds, (block for block in range(depth) if block not in protected)))


def described(kinds: Kinds) -> str:
    """The kinds in words, in the order of their first blocks."""
    return " and ".join(kind.replace("_", " ") for kind in dict.fromkeys(kinds))
