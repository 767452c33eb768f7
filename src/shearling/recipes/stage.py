"""A stage as it is declared: its kind, what it is made from, what it is told, what it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shearling.recipes.cost import StageCost
from shearling.recipes.work import StageKind


@dataclass(frozen=True)
class Given:
    """Something from outside: a ``model``, ``tokenizer``, ``text``, ``store`` or ``suite``."""

    of: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Made:
    """What an earlier stage makes, or one file of it."""

    stage: str
    file: str = ""


Inputs = Mapping[str, tuple[Given | Made, ...]]


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: its number and kind, which is that of its directory.
        kind: what it does.
        inputs: what it is made from, by what it is to the stage.
        options: what it is told; another value makes it anew.
        free: by option, what does not matter to what is made.
        cost: what it will take.
    """

    name: str
    kind: StageKind
    inputs: Inputs
    options: Mapping[str, Any]
    free: Mapping[str, Any] = field(default_factory=dict)
    cost: StageCost = field(default_factory=StageCost)

    @property
    def told(self) -> dict[str, Any]:
        """All options."""
        return {
            name: value | self.free.get(name, {}) if isinstance(value, dict) else value
            for name, value in self.options.items()
        }
