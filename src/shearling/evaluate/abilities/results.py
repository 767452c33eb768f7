"""What measuring abilities leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from shearling.evaluate.results import Interval
from shearling.files.results import Misfit, ResultFile, entry
from shearling.model.refs import ModelRef

LARGEST = 1e100  # nats; float32's largest number is far below


@dataclass(frozen=True)
class AbilityFigures:
    """One ability as one model has it. Free writing has no right answer, and other figures."""

    exact: float | None = entry("share of items that are right to the letter", absent=None)
    exact_interval: Interval | None = entry("of 95 %, Wilson's", absent=None)
    nll: float | None = entry("of the right answers, nats a token, mean over items", absent=None)
    nll_interval: Interval | None = entry("of 95 %, ± 1.96 standard errors", absent=None)
    repetition_4: float | None = entry(
        "of free writing: share of 4-grams that stood in the same text before", absent=None
    )
    tokens: float = entry("written an item, the end of the line included")
    expected_tokens: float | None = entry("of the right answers", absent=None)
    losses: tuple[float, ...] = entry("of each item in order: its nll, or its repetition_4")
    lengths: tuple[int, ...] = entry("tokens of each right answer", absent=())

    def __post_init__(self) -> None:
        """Refuse lengths that are not those of the losses."""
        if not self.losses or not all(abs(loss) < LARGEST for loss in self.losses):
            raise Misfit("losses", f"at least one number, none beyond {LARGEST:g},", self.losses)
        if (self.lengths and len(self.lengths) != len(self.losses)) or 0 in self.lengths:
            raise Misfit(
                "lengths", f"as many counts above 0 as losses, {len(self.losses)},",
                list(self.lengths),
            )  # fmt: skip


@dataclass(frozen=True)
class Abilities(ResultFile):
    """What one model can do, asked in items that are made from a seed."""

    kind: ClassVar[str] = "abilities"
    written_by: ClassVar[str] = "`eval --suite abilities`, `compare`"

    model: ModelRef = entry()
    seed: int = entry()
    limit: int | None = entry("of items of each ability", absent=None)
    bos: bool = entry("whether each prompt follows the BOS token", absent=False)
    asked_sha256: str = entry("of all prompts and answers: equal where two files compare")
    abilities: dict[str, AbilityFigures] = entry()
    sampling: Any = entry("of free writing, as of `generations`", absent=None)
    seconds: float | None = entry("of the model alone", absent=None)
    dtype: str | None = entry(absent=None)
    versions: dict[str, Any] = entry(absent={})
