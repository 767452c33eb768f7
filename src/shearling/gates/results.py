"""What training gates leaves behind beside the model: how they closed, and what they kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from shearling.files.results import Misfit, ResultFile, entry
from shearling.model.refs import ModelRef
from shearling.train.results import Look, check_looks

Counts = Annotated[tuple[int, ...], "a list of counts"]


@dataclass(frozen=True)
class GateStep:
    """One step of the training; means are over the rows of an axis."""

    step: int = entry()
    tokens: int | None = entry(absent=None)
    loss: float | None = entry("nats a token, of the batch", absent=None)
    expected: dict[str, float] = entry("gates open in a row, on average, by axis")
    wanted: dict[str, float] = entry("gates that were to be open by then, by axis")
    multipliers: dict[str, float] = entry(
        "the mean of the Lagrangian's linear ones, by axis; empty without it", absent={}
    )


@dataclass(frozen=True)
class LearningHistory(ResultFile):
    """How gates were trained; an axis that kept its size stands in ``source_shape`` alone."""

    kind: ClassVar[str] = "learning"
    written_by: ClassVar[str] = "`learn`, as `learning/learning.json`"

    model: ModelRef = entry()
    gates: str = entry("`hard-concrete` or `top-k`")
    source_shape: dict[str, int] = entry("size by axis")
    targets: dict[str, int] = entry(
        "by axis, how many gates of a row were to stay; rows are what has to stay equally long: "
        "the blocks, the stream's channels, a block's neurons, the query heads of a group"
    )
    units: dict[str, int] = entry("by axis, how many gates a row has")
    steps: tuple[GateStep, ...] = entry()
    looks: tuple[Look, ...] = entry("at held-out text, as of a healing run")
    histograms: dict[str, Counts] = entry(
        "by axis, how many gates ended in each twentieth of the range of the probability of being "
        "open"
    )
    probability_lost: dict[str, float] = entry(
        "by axis, the share of all open probability on gates that the cut closed; near 0 where "
        "gates had settled"
    )
    keep: Any = entry("as in `shearling.json`", absent=None)

    def __post_init__(self) -> None:
        """Refuse an axis without a size, a target, a histogram or its steps."""
        check_looks(self.looks)
        for axis, target in self.targets.items():
            self._check_axis(axis, target)

    def _check_axis(self, axis: str, target: int) -> None:
        if axis not in self.units:
            raise Misfit(f"units.{axis}", "a whole number")
        if not 0 < target <= self.units[axis]:
            raise Misfit(f"targets.{axis}", f"one of 1 to {self.units[axis]} units", target)
        if not self.histograms.get(axis):
            given = () if axis not in self.histograms else ([],)
            raise Misfit(f"histograms.{axis}", "a list of counts", *given)
        if axis not in self.probability_lost:
            raise Misfit(f"probability_lost.{axis}", "a number")
        multiplied = bool(self.steps) and axis in self.steps[0].multipliers
        for index, step in enumerate(self.steps):
            for key in ("expected", "wanted", *(("multipliers",) if multiplied else ())):
                if axis not in getattr(step, key):
                    raise Misfit(f"steps[{index}].{key}.{axis}", "a number")
