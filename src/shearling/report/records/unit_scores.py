"""Scores of the units of a width, as ``shearling score --axis`` writes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shearling.files.results import refuse
from shearling.model.refs import ModelRef
from shearling.scoring.results import UnitScoresFile


@dataclass(frozen=True)
class ScoredUnits:
    """One criterion's importance of an axis's units: a row a block, or one row for ``hidden``."""

    model: ModelRef
    criterion: str
    axis: str
    rows: tuple[tuple[float, ...], ...]
    calibration: Any
    created: str


def units_of(file: UnitScoresFile, path: Path) -> ScoredUnits:
    """What ``shearling score --axis`` wrote (ShearlingError if it does not say of which model)."""
    return ScoredUnits(
        model=file.model or refuse(path, "model", "an object", None),
        criterion=file.criterion,
        axis=file.axis,
        rows=file.scores,
        calibration=file.calibration,
        created=file.created,
    )
