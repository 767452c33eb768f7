"""Values that a result file leaves free, as text, names and numbers."""

from __future__ import annotations

from typing import Any

from shearling.files.results import public
from shearling.report.numbers import figure, memory

LISTED = 6  # of a longer list in a free-form field, only the first are written out


def name_of(value: Any) -> str:
    """What to call something: a text, or the ``name`` of an object; "" where that is neither."""
    if isinstance(value, dict):
        value = value.get("name") or ", ".join(f"{key} {one}" for key, one in value.items())
    return public(value) if isinstance(value, str) else ""


def as_number(value: Any) -> float | None:
    """A number, infinities and NaN among them; None where that is none that a float holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def describe(value: Any) -> str:
    """A free-form field (machine, calibration, sampling, an option) as one line of text."""
    if isinstance(value, dict):
        return ", ".join(_pair(str(key), one) for key, one in value.items() if one is not None)
    if isinstance(value, list):
        apart = "; " if any(isinstance(one, dict) for one in value) else ", "
        shown = apart.join(describe(one) for one in value[:LISTED])
        return shown if len(value) <= LISTED else f"{shown}, … ({len(value)} in all)"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return figure(value)
    return "none" if value is None else public(str(value))


def _pair(key: str, value: Any) -> str:
    """``{"memory_bytes": 2**30}`` as "memory 1.0 GiB", ``{"greedy": true}`` as "greedy"."""
    words = key.removesuffix("_bytes").replace("_", " ")
    if value is True:
        return words
    if key.endswith("_bytes") and isinstance(value, int):
        return f"{words} {memory(value)}"
    return f"{words} {describe(value)}"
