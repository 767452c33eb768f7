"""What scoring leaves behind: the importance of a model's blocks, or of the units of a width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from shearling.files.results import Misfit, ResultFile, entry
from shearling.model.refs import ModelRef

Numbers = Annotated[tuple[float, ...], "a list of numbers"]
Rows = Annotated[tuple[Numbers, ...], "a list of numbers for each block"]

ADVICE = "make one with: shearling score MODEL --calibration FILE --output scores.json"
_CALIBRATION = (
    "what was measured on: `file` or `sources`, `samples`, `length`, `seed`, `bos`: whether each "
    "window begins with BOS; null for criteria of weights alone"
)


@dataclass(frozen=True)
class BlockScoresFile(ResultFile):
    """How much each block of a model matters, by one criterion."""

    kind: ClassVar[str] = "scores"
    written_by: ClassVar[str] = "`score`, `demo`"

    advice: ClassVar[str] = ADVICE

    model: ModelRef | None = entry("absent where the file was written by hand", absent=None)
    criterion: str = entry("name as on the command line")
    axis: str = entry("`layers`")
    scores: Numbers = entry("by index; the lowest is removed first")
    order: tuple[int, ...] = entry("indices, the first removed first", absent=())
    protected: tuple[int, ...] = entry("blocks that are never removed", absent=())
    baseline_perplexity: float | None = entry(
        "of the intact model; null unless the scores are perplexities", absent=None
    )
    removal_order: tuple[int, ...] = entry(
        "blocks in the order of their removal, for `greedy` and `repair`; otherwise empty",
        absent=(),
    )
    calibration: Any = entry(_CALIBRATION, absent=None)
    seconds: float | None = entry(absent=None)
    runs: dict[str, Any] = entry(
        "of `repair`: by the first block of each run, the perplexity without it, repaired",
        absent={},
        omit=True,
    )

    def __post_init__(self) -> None:
        """Refuse no scores, blocks that were not scored, and one named twice."""
        if not self.scores:
            raise Misfit("scores", "at least one number", [])
        for key in ("order", "protected", "removal_order"):
            check_blocks(key, getattr(self, key), len(self.scores))


@dataclass(frozen=True)
class UnitScoresFile(ResultFile):
    """How much each unit of a width matters, by one criterion."""

    kind: ClassVar[str] = "unit-scores"
    written_by: ClassVar[str] = "`score --axis`"

    advice: ClassVar[str] = ADVICE

    model: ModelRef | None = entry("absent where the file was written by hand", absent=None)
    criterion: str = entry("name as on the command line")
    axis: str = entry("`mlp`, `heads`, `kv_heads`, `linear_heads` or `hidden`")
    scores: Rows = entry("a list for each block; one list for `hidden`")
    calibration: Any = entry(_CALIBRATION, absent=None)
    seconds: float | None = entry(absent=None)

    def __post_init__(self) -> None:
        """Refuse rows that are empty or not equally long."""
        if not self.scores or not all(self.scores):
            raise Misfit("scores", "a list of numbers for each block", list(self.scores))
        if len({len(row) for row in self.scores}) > 1:
            lengths = [len(row) for row in self.scores]
            raise Misfit("scores", "equally many numbers for each block", lengths)


def check_blocks(key: str, blocks: tuple[int, ...], count: int) -> None:
    """Raise Misfit unless these are different blocks of ``count``."""
    if len({block for block in blocks if block < count}) != len(blocks):
        raise Misfit(key, f"different blocks of {count}, numbered from 0,", list(blocks))
