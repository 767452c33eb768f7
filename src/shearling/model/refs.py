"""How a result file names the model it speaks of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from shearling.files.results import Name


@dataclass(frozen=True)
class ModelRef:
    """The model a file speaks of; files are joined by the fingerprint alone."""

    name: Name
    fingerprint: str


class Identified(Protocol):
    """What is known by a name and a fingerprint: a model, or one side of a match."""

    @property
    def name(self) -> str:
        """As people call it."""
        ...

    @property
    def fingerprint(self) -> str:
        """Another for any other content."""
        ...
