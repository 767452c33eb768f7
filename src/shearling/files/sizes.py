"""How many bytes and operations there are, in the unit in which a person can read them."""

from __future__ import annotations

_STEPS = ("", "k", "M", "G")


def in_bytes(count: float, digits: int = 1) -> str:
    """Decimal units, GB where that leaves two digits: 2.5e9 -> "2.5 GB", 4.2e8 -> "420.0 MB"."""
    return scaled(count, "B", digits)


def scaled(count: float, unit: str, digits: int = 1) -> str:
    """A count in G of a unit, or in less where it would round to fewer than two digits.

    Args:
        count: of the unit.
        unit: such as ``B`` or ``FLOP``.
        digits: behind the point.
    """
    step = 3
    while step and round(abs(count) / 1000**step, digits) < 10 ** (1 - digits):
        step -= 1
    shown = f"{count / 1000**step:,.{digits if step else 0}f}"
    return f"{shown} {_STEPS[step]}{unit}"
