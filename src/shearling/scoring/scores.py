"""Scores: how much each unit of an axis matters, and who says so."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError


@dataclass(frozen=True, slots=True)
class Scores:
    """Importance by index; the lowest is removed first.

    Attributes:
        criterion: name as on the command line.
        axis: what is scored, ``layers`` for whole blocks.
        values: one number an index.
        protected: indices that are never removed.
        removal_order: for criteria that score again after each removal, the indices in the order
            of their removal; it then takes precedence over ``values``.
        baseline_perplexity: perplexity of the intact model on the calibration text, if measured.
        details: further facts for the file: model, calibration, seconds.
    """

    criterion: str
    axis: str
    values: tuple[float, ...]
    protected: tuple[int, ...] = ()
    removal_order: tuple[int, ...] = ()
    baseline_perplexity: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def order(self) -> tuple[int, ...]:
        """Indices that may be removed, first removed first; ties go to the lower index."""
        rest = set(range(len(self.values))) - set(self.protected) - set(self.removal_order)
        return self.removal_order + tuple(sorted(rest, key=lambda i: (self.values[i], i)))

    def with_details(self, **details: Any) -> Scores:
        """A copy with more facts."""
        return replace(self, details={**self.details, **details})

    def require(self, *, axis: str, size: int, path: Path) -> Scores:
        """These scores, if they are of ``axis`` and of ``size`` units (ShearlingError)."""
        if self.axis != axis or len(self.values) != size:
            raise ShearlingError(
                f"{path} scores {len(self.values)} units of {self.axis}, but the model has "
                f"{size} {axis}; score this model."
            )
        return self

    def as_json(self) -> dict[str, Any]:
        """As in docs/files.md."""
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
        """Read what ``shearling score`` wrote.

        Raises:
            ShearlingError: not such a file.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            fields = {"criterion", "axis", "scores", "protected", "removal_order"}
            fields |= {"baseline_perplexity", "kind", "order"}
            scores = Scores(
                str(data["criterion"]),
                str(data["axis"]),
                tuple(float(value) for value in data["scores"]),
                tuple(int(i) for i in data.get("protected", ())),
                tuple(int(i) for i in data.get("removal_order", ())),
                data.get("baseline_perplexity"),
                {k: v for k, v in data.items() if k not in fields},
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ShearlingError(
                f"{path} is not a scores file ({reason}); "
                "make one with: shearling score MODEL --calibration FILE --output scores.json."
            ) from error
        if not all(math.isfinite(value) for value in scores.values):
            raise ShearlingError(
                f"{path} holds scores that are not finite numbers; score the model again."
            )
        for name in ("protected", "removal_order"):
            indices = getattr(scores, name)
            distinct = set(indices) & set(range(len(scores.values)))
            if len(distinct) != len(indices):
                raise ShearlingError(
                    f"{path} gives {list(indices)} as {name}, but it scores "
                    f"{len(scores.values)} units, numbered from 0, each named at most once; "
                    "score the model again."
                )
        return scores
