"""Typed access to the fields of a result file; an error names the file and the field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, NoReturn

from shearling.files.results import public, refuse
from shearling.report.numbers import figure, memory

LISTED = 6  # of a longer list in a free-form field, only the first are written out


@dataclass(frozen=True)
class Fields:
    """A JSON object of a result file; reads a field as a type or refuses the file."""

    values: Mapping[str, Any]
    path: Path
    inside: str = ""  # how to get from the file's root to this object, for messages

    def has(self, key: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(key) is not None

    def raw(self, key: str) -> Any:
        """The value as JSON gave it, or None."""
        return self.values.get(key)

    def refuse(self, key: str, expected: str) -> NoReturn:
        """Say that this file cannot be used, and what would write it anew."""
        refuse(self.path, self.inside + key, expected, self.values.get(key, MISSING))

    def text(self, key: str) -> str:
        """A string."""
        value = self.raw(key)
        return value if isinstance(value, str) else self.refuse(key, "a text")

    def label(self, key: str) -> str:
        """What to call something: a string, or the ``name`` of an object."""
        value = self.raw(key)
        if isinstance(value, dict):
            value = value.get("name") or ", ".join(f"{k} {v}" for k, v in value.items())
        return public(value) if isinstance(value, str) and value else self.refuse(key, "a name")

    def integer(self, key: str) -> int:
        """A whole number of zero or more."""
        value = self.raw(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            self.refuse(key, "a whole number")
        return value

    def number(self, key: str) -> float:
        """A number; infinities and NaN are let through, they are results too."""
        value = _as_number(self.raw(key))
        return self.refuse(key, "a number") if value is None else value

    def maybe_integer(self, key: str) -> int | None:
        """A whole number, or None where the field is absent or null."""
        return self.integer(key) if self.has(key) else None

    def maybe_number(self, key: str) -> float | None:
        """A number, or None where the field is absent or null."""
        return self.number(key) if self.has(key) else None

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of numbers; null stands for NaN, which JSON cannot say."""
        values = [math.nan if one is None else _as_number(one) for one in self.items(key)]
        if any(one is None for one in values):
            self.refuse(key, "a list of numbers")
        return tuple(one for one in values if one is not None)

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers."""
        values = self.items(key)
        if any(isinstance(one, bool) or not isinstance(one, int) for one in values):
            self.refuse(key, "whole numbers")
        return tuple(values)

    def items(self, key: str) -> list[Any]:
        """A list."""
        value = self.raw(key)
        return value if isinstance(value, list) else self.refuse(key, "a list")

    def mapping(self, key: str) -> dict[str, Any]:
        """An object; absent or null is an empty one."""
        value = self.raw(key)
        if value is None:
            return {}
        return value if isinstance(value, dict) else self.refuse(key, "an object")

    def child(self, key: str) -> Fields:
        """The fields of an object inside this one; it has to be there."""
        if not self.has(key):
            self.refuse(key, "an object")
        return Fields(self.mapping(key), self.path, f"{self.inside}{key}.")

    def children(self, key: str) -> list[Fields]:
        """The fields of each object of a list."""
        values = self.items(key)
        if any(not isinstance(one, dict) for one in values):
            self.refuse(key, "a list of objects")
        return [
            Fields(one, self.path, f"{self.inside}{key}[{index}].")
            for index, one in enumerate(values)
        ]


def _as_number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def describe(value: Any) -> str:
    """A free-form field (machine, calibration, sampling, an option) as one line of text."""
    if isinstance(value, dict):
        return ", ".join(_pair(str(key), one) for key, one in value.items() if one is not None)
    if isinstance(value, list):
        shown = ", ".join(describe(one) for one in value[:LISTED])
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
