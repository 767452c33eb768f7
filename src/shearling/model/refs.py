"""How a result file names the model it speaks of."""

from __future__ import annotations

from dataclasses import dataclass

from shearling.files.results import Name


@dataclass(frozen=True)
class ModelRef:
    """The model a file speaks of; files are joined by the fingerprint alone."""

    name: Name
    fingerprint: str
