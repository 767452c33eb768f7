"""What a budget cares for most: which share of what goes whole blocks give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shearling.errors import ShearlingError

# Of what a budget takes away, whole blocks give this share and MLP neurons the rest, as long as
# half of them stay: on SmolLM2 better than a sixth, a half, all or nothing (LOG.md).
BLOCKS_GIVE = 1 / 3


@dataclass(frozen=True, slots=True)
class Preference:
    """What a budget cares for most.

    Attributes:
        blocks_give: the share of what goes that whole blocks give.
        costs: what that costs, in words.
    """

    blocks_give: float
    costs: str


DEFAULT_PREFERENCE = "balanced"
# By the names of --prefer. Measured on SmolLM2-135M-Instruct, one draw of calibration text.
PREFERENCES: Mapping[str, Preference] = {
    "quality": Preference(
        BLOCKS_GIVE,
        "blocks give a third of what goes, where perplexity is least (51.7 on WikiText-2 at -20 % "
        "of SmolLM2), which decodes slower than the same parameters in blocks alone",
    ),
    "balanced": Preference(
        BLOCKS_GIVE,
        "blocks give a third of what goes: 51.7 on WikiText-2 at -20 % of SmolLM2 and 1.10x its "
        "decode speed, where blocks alone give 62.7 and 1.18x",
    ),
    "speed": Preference(
        1.0,
        "blocks give all that goes: 1.18x the decode speed at -20 % of SmolLM2 and 62.7 on "
        "WikiText-2, where a third from blocks gives 1.10x and 51.7",
    ),
}


def require_preference(prefer: str | None) -> str:
    """A name of :data:`PREFERENCES`, the default for None (ShearlingError for another)."""
    if prefer is None:
        return DEFAULT_PREFERENCE
    if prefer not in PREFERENCES:
        raise ShearlingError(
            f"--prefer {prefer!r} was given, but one of {', '.join(PREFERENCES)} was expected."
        )
    return prefer
