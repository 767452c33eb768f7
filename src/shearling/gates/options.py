"""What ``shearling learn`` can be told: everything healing can, and how the gates are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.train.options import Options, pairs_into, validated

# Sheared LLaMA (2310.06694), section 3.1 and the released code; the lengths are shares of the run.
SHEARED: dict[str, Any] = {
    "gates": "hard-concrete", "warm_start": False, "refit": False, "mix": "dynamic",
    "weight_decay": 0.0, "warmup": 0.1, "rise": 0.2, "lr": 1e-4, "gate_lr": 1.0,
    "multiplier_lr": 1.0, "final": 0.1, "constraint": "lagrangian",
}  # fmt: skip
# The first is the best where tokens are few (LOG.md): gates need steps to settle.
RECIPES: dict[str, dict[str, Any]] = {"scores": {"gates": "scores"}, "warm": {}, "sheared": SHEARED}


class LearnOptions(Options):
    """Options of a run that learns what to keep; those of healing, and these.

    Attributes:
        gates: ``hard-concrete`` (Sheared LLaMA), ``top-k`` (as many open as may be, gradients
            straight through), or ``scores``: no gates, the one-shot choice, and all of the
            tokens spent on healing it.
        constraint: what keeps sizes on their way to the target: ``lagrangian`` (the paper's), or
            ``projection``, which is exact at every step.
        gate_lr: of AdamW on the gates; ``multiplier_lr`` on the Lagrangian's multipliers.
        rise: share of the steps over which the target sizes are approached.
        warm_start: gates start in the order of one-shot scores, or all open.
        spread: of the starting gates, in log alpha, from the worst unit to the best.
        refit: solve what writes into the stream anew after the cut, if held-out text agrees.
        samples: sequences of the store for scores and refit; ``sample_length``: tokens of each.
    """

    what: ClassVar[str] = "learning"

    weight_decay: float = Field(default=0.0, ge=0)
    warmup: float = Field(default=0.1, ge=0, le=1)
    gates: Literal["hard-concrete", "top-k", "scores"] = "hard-concrete"
    constraint: Literal["projection", "lagrangian"] = "projection"
    gate_lr: float = Field(default=0.2, gt=0)
    multiplier_lr: float = Field(default=1.0, gt=0)
    rise: float = Field(default=0.2, ge=0, le=1)
    warm_start: bool = True
    spread: float = Field(default=40.0, gt=0)
    refit: bool = True
    samples: int = Field(default=64, ge=4)
    sample_length: int = Field(default=256, gt=1)

    @model_validator(mode="after")
    def _check_recipe(self) -> LearnOptions:
        if self.recipe not in ("cpt", "distill"):
            raise ValueError(f"gates are learned by cpt or distill, not by {self.recipe}")
        if self.optimizer != "adamw" and self.gates != "scores":
            raise ValueError("gates are trained by optimizer=adamw, in float32 weights")
        return self

    def healing(self) -> Options:
        """The options that healing knows, for the tokens spent without gates."""
        return Options(**{name: getattr(self, name) for name in Options.model_fields})


def parse(recipe: str, tokens: int, pairs: Sequence[str], *, distil: bool) -> LearnOptions:
    """Options of a recipe, changed by the command line's ``key=value`` pairs.

    Raises:
        ShearlingError: an unknown recipe or key (those there are get named), or a value that does
            not fit.
    """
    if recipe not in RECIPES:
        raise ShearlingError(f"--recipe {recipe} is not known; choose one of {', '.join(RECIPES)}.")
    values = RECIPES[recipe] | {"recipe": "distill" if distil else "cpt", "tokens": tokens}
    return validated(pairs_into(values, pairs), LearnOptions)


def trained(source: Checkpoint, after: Mapping[str, int], options: Options) -> Checkpoint:
    """The model that is trained on its way to the sizes ``after``: by scores, the one cut before.

    Of that only the shape is its own; all else is the source's.
    """
    if isinstance(options, LearnOptions) and options.gates == "scores":
        return replace(source, shape=source.shape.with_(**after))
    return source
