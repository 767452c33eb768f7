"""What a repair gives back: tensors that were solved anew, and how well each did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Solved:
    """What one writer's repair achieved.

    Attributes:
        block: its number in the source.
        axis: ``heads`` or ``mlp``.
        strength: of the penalty that held-out tokens chose; None where none helped.
        error_before, error_after: share of the stream's squared norm that was, and is, missing
            on held-out tokens (tokens weighted by the inverse of their squared norm).
    """

    block: int
    axis: str
    strength: float | None
    error_before: float
    error_after: float


@dataclass(frozen=True, slots=True)
class SourceDamage:
    """What a repaired cut lost on one of the calibration sources, on its held-out windows.

    Attributes:
        name: of the source.
        windows, tokens: how many were held out, and predicted.
        perplexity_before, perplexity_after: of the source model, and of the repaired cut.
        divergence: of the next-token distribution from the source model's, in nats a token.
    """

    name: str
    windows: int
    tokens: int
    perplexity_before: float
    perplexity_after: float
    divergence: float


@dataclass(frozen=True)
class Repair:
    """Tensors of the result that were solved anew.

    Attributes:
        replaced: name in the result -> a function that reads it.
        steps: one a writer.
        warnings: sentences for the user.
        seconds: what it took.
        tokens: how many it was solved on.
        divergence: of the next-token distribution from the source's on held-out tokens, in nats,
            before and after the final norm's gain was fitted; None where it was left alone.
        divergence_words: over how many words of a large vocabulary that is
            (:mod:`shearling.engine.words`); None over all.
        final_norm: whether fitting it was asked for.
        sources: the damage on each of several calibration sources; of one alone it is not told
            apart.
    """

    replaced: Mapping[str, Callable[[], Tensor]]
    steps: tuple[Solved, ...]
    warnings: tuple[str, ...]
    seconds: float
    tokens: int
    divergence: tuple[float, float] | None = None
    divergence_words: int | None = None
    final_norm: bool = True
    sources: tuple[SourceDamage, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """For the manifest."""
        apart = {"sources": [asdict(one) for one in self.sources]} if self.sources else {}
        return {
            "seconds": round(self.seconds, 2),
            "tokens": self.tokens,
            "warnings": list(self.warnings),
            "final_norm": self.final_norm,
            "divergence": None if self.divergence is None else list(self.divergence),
            "divergence_words": self.divergence_words,
            **apart,
            "steps": [asdict(step) for step in self.steps],
        }
