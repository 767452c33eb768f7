"""Scores: how much each unit of an axis matters, and who says so."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError
from shearling.table.axes import Layout
from shearling.table.values import Shape

_FIELDS = {
    "scores": {
        "kind", "criterion", "axis", "scores", "order", "protected", "removal_order",
        "baseline_perplexity",
    },
    "unit-scores": {"kind", "criterion", "axis", "scores"},
}  # fmt: skip


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
        if axis is not None and (len(self.rows), len(self.rows[0])) == (rows, shape[self.axis]):
            return self
        by_row = not len(self.rows) == rows == 1  # a single row goes without saying
        given = f"{len(self.rows)} x " * by_row + str(len(self.rows[0]))
        has = "no such axis"
        if axis is not None:
            has = f"{rows} x " * by_row + f"{shape[self.axis]} {self.axis}"
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
                f"{by} gives no finite score for {len(blocks)} of {len(self.values)} blocks of "
                f"{model}, the first being {blocks[0]}; its weights hold NaN or infinity, or "
                "overflow: fetch the checkpoint again."
            )
        where = f"in block {broken.index(True)}" if len(self.rows) > 1 else "of the model"
        raise ShearlingError(
            f"{by} gives scores that are not finite numbers to {self.axis} {where} ({model}); its "
            "weights hold NaN or infinity, or overflow: fetch the checkpoint again."
        )

    def as_json(self) -> dict[str, Any]:
        """As in docs/files.md: ``scores`` of blocks, ``unit-scores`` of units."""
        if self.axis != "layers":
            known = _FIELDS["unit-scores"]
            return {
                "kind": "unit-scores",
                "criterion": self.criterion,
                "axis": self.axis,
                "scores": [list(row) for row in self.rows],
                **{key: value for key, value in self.details.items() if key not in known},
            }
        return {
            "kind": "scores",
            "criterion": self.criterion,
            "axis": self.axis,
            "scores": list(self.values),
            "order": list(self.order),
            "protected": list(self.protected),
            "baseline_perplexity": self.baseline_perplexity,
            "removal_order": list(self.removal_order),
            **self.details,
        }

    @staticmethod
    def load(path: Path) -> Scores:
        """Read what ``shearling score`` wrote, of blocks or of units.

        A file without a ``kind`` may be written by hand: criterion, axis and a list of scores.

        Raises:
            ShearlingError: not such a file, or scores that are not finite.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            criterion, axis, rows = str(data["criterion"]), str(data["axis"]), data["scores"]
            kind = "unit-scores" if data.get("kind") == "unit-scores" else "scores"
            known: dict[str, Any] = {}
            if axis == "layers":
                known = {
                    "protected": tuple(int(i) for i in data.get("protected", ())),
                    "removal_order": tuple(int(i) for i in data.get("removal_order", ())),
                    "baseline_perplexity": data.get("baseline_perplexity"),
                }
            scores = Scores(
                criterion, axis,
                tuple(
                    tuple(float(value) for value in row)
                    for row in (rows if kind == "unit-scores" else [rows])
                ),
                **known,
                details={key: value for key, value in data.items() if key not in _FIELDS[kind]},
            )  # fmt: skip
        except (
            *(OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError),
            ShearlingError,
        ) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ShearlingError(
                f"{path} is not a scores file ({reason}); "
                "make one with: shearling score MODEL --calibration FILE --output scores.json."
            ) from error
        return scores._checked(path)

    def _checked(self, path: Path) -> Scores:
        if not all(math.isfinite(value) for row in self.rows for value in row):
            raise ShearlingError(
                f"{path} holds scores that are not finite numbers; score the model again."
            )
        for name in ("protected", "removal_order"):
            indices = getattr(self, name)
            distinct = set(indices) & set(range(len(self.rows[0])))
            if len(distinct) != len(indices):
                raise ShearlingError(
                    f"{path} gives {list(indices)} as {name}, but it scores "
                    f"{len(self.rows[0])} units, numbered from 0, each named at most once; "
                    "score the model again."
                )
        return self
