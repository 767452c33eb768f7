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
        costs: what that costs, in words that follow a figure.
    """

    blocks_give: float
    costs: str


DEFAULT_PREFERENCE = "balanced"
# By the names of --prefer.
_SPEED = "; --prefer speed takes blocks alone, which decodes faster and costs more quality"
PREFERENCES: Mapping[str, Preference] = {
    "quality": Preference(BLOCKS_GIVE, _SPEED),
    "balanced": Preference(BLOCKS_GIVE, _SPEED),
    "speed": Preference(1.0, ""),
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
