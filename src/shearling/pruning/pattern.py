"""Which blocks can go so that llama.cpp still takes each that stays for what it is.

llama.cpp counts: in a Gemma 3 every sixth block attends to everything, and the others slide; in a
SmolLM 3 every fourth is without rotary positions. A cut whose blocks are of other kinds than their
new numbers say runs as another model. So is the scale of attention, which for some depths it takes
to be another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from shearling.table.families import Family
from shearling.table.families.llama_cpp import ROTATED, UNROTATED, LlamaCppFacts
from shearling.table.values import Shape


@dataclass(frozen=True, slots=True)
class Pattern:
    """The kinds of a model's blocks, and how llama.cpp counts them.

    Attributes:
        facts: of the architecture.
        kinds: of each block, as the configuration lists them.
        scalar: what the configuration has attention divided by the root of.
    """

    facts: LlamaCppFacts
    kinds: tuple[str, ...]
    scalar: float | None

    def counted(self, depth: int) -> tuple[str, ...]:
        """The kinds of ``depth`` blocks as llama.cpp counts them."""
        return self.facts.kinds(depth) or ()

    def holds(self, kept: Sequence[int]) -> bool:
        """Whether llama.cpp takes the blocks that stay for what they are."""
        return tuple(self.kinds[block] for block in kept) == self.counted(len(kept))

    def matters(self, config: Any) -> bool:
        """Whether blocks of two kinds compute differently, and no file says which is which."""
        if self.facts.listed:
            return False
        return self.facts.unrotated is not None or bool(getattr(config, "sliding_window", None))

    def misread(self, config: Any, kept: Sequence[int]) -> bool:
        """Whether llama.cpp would run blocks that stay as others than they are."""
        return self.matters(config) and not self.holds(kept)

    def removals(self, removed: int, limit: int = 3) -> list[tuple[int, ...]]:
        """The first few sets of so many blocks that can go; fewer or none if there are no more."""
        sets = []
        for kept in self._kept(len(self.kinds) - removed):
            sets.append(tuple(block for block in range(len(self.kinds)) if block not in kept))
            if len(sets) == limit:
                break
        return sets

    def depths(self) -> list[int]:
        """Numbers of blocks, below the model's own, that some removal leaves in order."""
        return [depth for depth in range(1, len(self.kinds)) if self.removals(self._less(depth), 1)]

    def cheapest(self, costs: Sequence[float], depth: int) -> tuple[int, ...] | None:
        """The blocks to keep so that what goes costs least in sum, or None if none can be.

        Args:
            costs: of removing each block; infinite where it must stay.
            depth: how many stay.
        """
        counted = self.counted(depth)
        # Blocks kept so far -> the least that the others before have cost, and which were kept.
        best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
        for block, kind in enumerate(self.kinds):
            after: dict[int, tuple[float, tuple[int, ...]]] = {}
            for kept, (cost, blocks) in best.items():
                options = [(kept, cost + costs[block], blocks)]
                if kept < depth and counted[kept] == kind:
                    options.append((kept + 1, cost, (*blocks, block)))
                for count, total, chosen in options:
                    if total < after.get(count, (math.inf, ()))[0]:
                        after[count] = (total, chosen)
            best = after
        return best[depth][1] if depth in best else None

    def _less(self, depth: int) -> int:
        return len(self.kinds) - depth

    def _kept(self, depth: int) -> Iterator[tuple[int, ...]]:
        """Every choice of ``depth`` blocks in order, none begun that cannot be ended."""
        counted, kinds = self.counted(depth), self.kinds

        @cache
        def possible(block: int, kept: int) -> bool:
            if kept == depth:
                return True
            if len(kinds) - block < depth - kept:
                return False
            fits = counted[kept] == kinds[block] and possible(block + 1, kept + 1)
            return fits or possible(block + 1, kept)

        def choices(block: int, blocks: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
            if len(blocks) == depth:
                yield blocks
            elif possible(block, len(blocks)):
                if counted[len(blocks)] == kinds[block]:
                    yield from choices(block + 1, (*blocks, block))
                yield from choices(block + 1, blocks)

        yield from choices(0, ())


def pattern_of(family: Family, config: Any) -> Pattern | None:
    """The pattern of a model's blocks, or None where llama.cpp's are all alike."""
    facts = family.llama_cpp
    if facts is None:
        return None
    if facts.unrotated is not None:
        rotated = config.no_rope_layers  # as the key does not say: 1 where there are positions
        return Pattern(facts, tuple(ROTATED if one else UNROTATED for one in rotated), None)
    if facts.period is None:
        return None
    scalar = getattr(config, facts.scalar) if facts.scalar is not None else None
    return Pattern(facts, tuple(config.layer_types), scalar)


def scaled_otherwise(pattern: Pattern, shape: Shape) -> float | None:
    """What llama.cpp takes attention of a model of ``shape`` to be scaled by, if it is wrong."""
    if pattern.scalar is None:
        return None
    taken = pattern.facts.scaled_by(
        shape["layers"], shape["hidden"], shape["heads"], shape["head_dim"]
    )
    return None if taken == pattern.scalar else taken


def removal_words(removals: Sequence[Sequence[int]]) -> str:
    """Sets of blocks, as --remove takes them."""
    return " or ".join(",".join(map(str, removed)) for removed in removals)
