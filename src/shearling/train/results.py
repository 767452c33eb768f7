"""What training leaves behind beside the model: its history, and losses to reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from shearling.files.results import Misfit, ResultFile, entry
from shearling.model.refs import ModelRef


@dataclass(frozen=True)
class Look:
    """Held-out losses at one moment of a training."""

    losses: dict[str, float] = entry("nats a token, by domain")
    weights: dict[str, float] = entry("shares of the domains in what it trained on")
    tokens: int = entry("trained on until then")
    seconds: float | None = entry(
        "of training until then; an older file has none", absent=None, omit=True
    )


def check_looks(looks: Sequence[Look]) -> None:
    """Raise Misfit unless every look has the domains of the first, and its time if that has one."""
    for index, look in enumerate(looks):
        for domain in looks[0].losses:
            for key, values in (("losses", look.losses), ("weights", look.weights)):
                if domain not in values:
                    raise Misfit(f"looks[{index}].{key}.{domain}", "a number")
        if look.seconds is None and looks[0].seconds is not None:
            raise Misfit(f"looks[{index}].seconds", "a number")


@dataclass(frozen=True)
class HealingHistory(ResultFile):
    """Held-out losses of a healing run over the tokens trained on."""

    kind: ClassVar[str] = "healing"
    written_by: ClassVar[str] = "`heal`, as `healing/healing.json`"

    model: ModelRef = entry()
    recipe: str = entry()
    looks: tuple[Look, ...] = entry("at held-out text, the oldest first")
    reference: dict[str, float] | None = entry(
        "the losses by domain that a dynamic mix followed", absent=None
    )

    def __post_init__(self) -> None:
        """Refuse looks at different domains."""
        check_looks(self.looks)


@dataclass(frozen=True)
class ReferenceLosses(ResultFile):
    """Losses that a model of some size would have, and where they come from."""

    kind: ClassVar[str] = "reference"
    written_by: ClassVar[str] = "`reference`"
    advice: ClassVar[str] = (
        "make one with: shearling reference MODEL --store STORE --output reference.json"
    )

    losses: dict[str, float] = entry("nats a token, by domain")
    how: dict[str, Any] = entry(
        "`method` (`measured`, `law` or `given`) and its facts: the model and its `parameters`, or "
        "the law and its residuals",
        absent={},
        by_name=False,
    )
