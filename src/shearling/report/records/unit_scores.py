"""Scores of the units of a width, as ``shearling score --axis`` writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shearling.model.refs import ModelRef
from shearling.report.records.fields import Fields
from shearling.report.records.refs import read_created, read_ref


@dataclass(frozen=True)
class ScoredUnits:
    """One criterion's importance of an axis's units: a row a block, or one row for ``hidden``."""

    model: ModelRef
    criterion: str
    axis: str
    rows: tuple[tuple[float, ...], ...]
    calibration: Any
    created: str


def read_unit_scores(fields: Fields) -> ScoredUnits:
    """Read what ``shearling score --axis`` wrote."""
    lists = fields.items("scores")
    if not lists or not all(isinstance(row, list) and row for row in lists):
        fields.refuse("scores", "a list of numbers for each block")
    rows = Fields({f"scores[{n}]": row for n, row in enumerate(lists)}, fields.path, fields.inside)
    return ScoredUnits(
        model=read_ref(fields.child("model")),
        criterion=fields.text("criterion"),
        axis=fields.text("axis"),
        rows=tuple(rows.numbers(name) for name in rows.values),
        calibration=fields.raw("calibration"),
        created=read_created(fields),
    )
