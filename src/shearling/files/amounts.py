"""Sizes and times as users write them, units in any case: ``0.8x``, ``113M``, ``8gb``, ``20ms``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fractions import Fraction

COUNTS: Mapping[str, int] = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
# By unit: 8G, 8GB, 8Gi and 8GiB.
BYTES: Mapping[str, int] = {
    f"{letter}{binary}{ending}": (1024 if binary else 1000) ** power
    for power, letter in enumerate("kmgt", 1)
    for binary in ("", "i")
    for ending in ("", "b")
}
_AMOUNT = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([a-z]*)", re.ASCII | re.IGNORECASE)
# Without a unit, a number with a comma may be two counts, unless the first of them is nothing.
_COMMA = re.compile(
    r"(0|[0-9]{1,3}(?=,[0-9]+\s*[a-z])),([0-9]+\s*[a-z]*)", re.ASCII | re.IGNORECASE
)


def amount(text: str, units: Iterable[str]) -> tuple[Fraction, str] | None:
    """The number and the unit, in small letters; None where it is neither, or no unit of these."""
    match = _AMOUNT.fullmatch(text.strip())
    if match is None or (unit := match[2].lower()) not in units:
        return None
    return Fraction(match[1]), unit


def pointed(text: str) -> str:
    """``"; write 0.8x with a decimal point"`` where 0,8x was given, else ""."""
    meant = with_point(text)
    return "" if meant is None else f"; write {meant} with a decimal point"


def with_point(text: str) -> str | None:
    """``0.8x`` for ``0,8x``; None for what does not look like a number with a decimal comma."""
    match = _COMMA.fullmatch(text.strip())
    return None if match is None else f"{match[1]}.{match[2]}"
