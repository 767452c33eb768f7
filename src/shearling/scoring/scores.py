"""Scores: how much each unit of an axis matters, and who says so."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError, count_of
from shearling.files.reading import read_json
from shearling.files.results import UnfitFile
from shearling.model.refs import ModelRef
from shearling.scoring.results import ADVICE, BlockScoresFile, UnitScoresFile
from shearling.table.axes import units_of
from shearling.table.layout import Layout
from shearling.table.values import Shape

_OF_BLOCKS = ("protected", "removal_order", "baseline_perplexity")
_TOLD = {"kind", "criterion", "axis", "scores", "order", *_OF_BLOCKS}  # besides the details


@dataclass(frozen=True, slots=True)
class Scores:
    """Importance of the units of an axis; the lowest of a row is removed first.

    A block has neurons, query heads and key/value groups of its own, so that those have a row for
    each block. The blocks themselves are one row, and so are the channels of the residual stream,
    which blocks share. Only numbers within a row are comparable.

    Attributes:
        criterion: name as on the command line.
        axis: what is scored: ``layers`` for whole blocks, or ``mlp``, ``heads``, ``kv_heads``,
            ``hidden``.
        rows: numbers by row and unit, all rows equally long.
        protected: blocks that are never removed.
        removal_order: for criteria that score again after each removal, the blocks in the order
            of their removal; it then takes precedence over the numbers.
        baseline_perplexity: perplexity of the intact model on the calibration text, if measured.
        details: further facts for the file: model, calibration, seconds.

    Raises:
        ShearlingError: rows that are empty or not equally long, or several of ``layers``.
    """

    criterion: str
    axis: str
    rows: tuple[tuple[float, ...], ...]
    protected: tuple[int, ...] = ()
    removal_order: tuple[int, ...] = ()
    baseline_perplexity: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse rows of unequal length (ShearlingError)."""
        if not self.rows or len({len(row) for row in self.rows}) != 1 or not self.rows[0]:
            raise ShearlingError(
                f"scores of {self.axis} must be rows of equally many numbers, but were given as "
                f"rows of {[len(row) for row in self.rows]}."
            )
        if self.axis == "layers" and len(self.rows) != 1:
            raise ShearlingError(
                f"scores of layers must be one row, but {len(self.rows)} rows were given."
            )
        of_blocks = self.protected, self.removal_order, self.baseline_perplexity
        assert self.axis == "layers" or of_blocks == ((), (), None), "only blocks have these"

    @property
    def values(self) -> tuple[float, ...]:
        """The numbers of an axis that has a single row: ``layers`` or ``hidden``."""
        (row,) = self.rows
        return row

    @property
    def order(self) -> tuple[int, ...]:
        """Blocks that may be removed, first removed first; ties go to the lower index."""
        values = self.values
        rest = set(range(len(values))) - set(self.protected) - set(self.removal_order)
        return self.removal_order + tuple(sorted(rest, key=lambda i: (values[i], i)))

    def with_details(self, **details: Any) -> Scores:
        """A copy with more facts."""
        return replace(self, details={**self.details, **details})

    def require(self, layout: Layout, shape: Shape, *, file: Path | None = None) -> Scores:
        """These scores, if they are of as many rows and units as a model has (ShearlingError).

        Args:
            layout: the table of the model's architecture.
            shape: its sizes.
            file: where the scores are from, for the message.
        """
        axis = layout.axis.get(self.axis)
        rows = shape["layers"] if axis is not None and axis.per_block else 1
        if axis is not None and (len(self.rows), len(self.rows[0])) == (
            rows,
            units_of(self.axis, shape),
        ):
            return self
        by_row = not len(self.rows) == rows == 1  # a single row goes without saying
        given = f"{len(self.rows)} x " * by_row + str(len(self.rows[0]))
        has = "no such axis"
        if axis is not None:
            has = f"{rows} x " * by_row + f"{units_of(self.axis, shape)} {self.axis}"
        whose = f"{file} scores" if file else "scores were given for"
        raise ShearlingError(
            f"{whose} {given} units of {self.axis}, but the model has {has}; score this model."
        )

    def require_finite(self, model: str, by: str | None = None) -> Scores:
        """These scores, if all of them are numbers to compare by (ShearlingError).

        Args:
            model: its name, for the message.
            by: the criterion's name there, if it is another.
        """
        by = by or self.criterion
        broken = [not all(map(math.isfinite, row)) for row in self.rows]
        if not any(broken):
            return self
        if self.axis == "layers":
            blocks = [i for i, value in enumerate(self.values) if not math.isfinite(value)]
            raise ShearlingError(
                f"{by} gives no finite score for {len(blocks)} of "
                f"{count_of(len(self.values), 'block')} of {model}, the first being {blocks[0]}; "
                "its weights hold NaN or infinity, or overflow: fetch the checkpoint again."
            )
        where = f"in block {broken.index(True)}" if len(self.rows) > 1 else "of the model"
        raise ShearlingError(
            f"{by} gives scores that are not finite numbers to {self.axis} {where} ({model}); its "
            "weights hold NaN or infinity, or overflow: fetch the checkpoint again."
        )

    def as_json(self) -> dict[str, Any]:
        """As in docs/files.md: ``scores`` of blocks, ``unit-scores`` of units.

        What nobody told (the model, when it was) is left out.
        """
        told = _TOLD | self.details.keys()
        return {key: value for key, value in self._file().to_json().items() if key in told}

    def _file(self) -> BlockScoresFile | UnitScoresFile:
        facts: dict[str, Any] = {"criterion": self.criterion, "axis": self.axis, **self.details}
        if "model" in facts:
            facts["model"] = ModelRef(**facts["model"])
        if self.axis != "layers":
            return UnitScoresFile(**facts, scores=self.rows)
        of_blocks = {key: getattr(self, key) for key in _OF_BLOCKS}
        return BlockScoresFile(**facts, **of_blocks, scores=self.values, order=self.order)

    @staticmethod
    def load(path: Path) -> Scores:
        """Read what ``shearling score`` wrote, of blocks or of units.

        A file without a ``kind`` may be written by hand: criterion, axis and a list of scores.

        Raises:
            ShearlingError: not such a file, or scores that are not finite.
        """
        values = read_json(path, ADVICE)
        of = UnitScoresFile if values.get("kind") == UnitScoresFile.kind else BlockScoresFile
        try:
            file = of.from_json(values, path)
        except UnfitFile as error:
            raise ShearlingError(
                f"{path} is not a scores file ({error.reason}); {ADVICE}."
            ) from error
        rows = file.scores if isinstance(file, UnitScoresFile) else (file.scores,)
        if not all(math.isfinite(value) for row in rows for value in row):
            raise ShearlingError(
                f"{path} holds scores that are not finite numbers; score the model again."
            )
        if file.axis == "layers" and len(rows) != 1:
            raise ShearlingError(
                f"{path} scores layers in {len(rows)} rows, but one was expected; {ADVICE}."
            )
        known = {field.name for field in fields(file)} - _TOLD
        of_blocks = {key: getattr(file, key) for key in _OF_BLOCKS if file.axis == "layers"}
        return Scores(
            file.criterion, file.axis, rows, **of_blocks,
            details={key: value for key, value in values.items() if key in known},
        )  # fmt: skip
