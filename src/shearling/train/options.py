"""What a healing run can be told, with defaults; every key is an option of ``shearling heal``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shearling.data.seeds import LARGEST
from shearling.errors import ShearlingError, misfit, nearest
from shearling.files.reading import parse_yaml

Recipe = Literal["cpt", "lora", "cpt-then-lora", "distill"]
LONGEST = 80  # characters of a value that an error shows
RECIPES: tuple[Recipe, ...] = ("cpt", "lora", "cpt-then-lora", "distill")

_Beta = Annotated[float, Field(ge=0, lt=1)]
# More sequences than there are tokens anywhere: whatever counts them would not fit in memory.
_Sequences = Annotated[int, Field(gt=0, le=10**9)]


class Options(BaseModel):
    """Options of one run.

    Attributes:
        recipe: ``cpt`` trains every weight on text; ``lora`` adapters alone, merged at the end;
            ``distill`` every weight towards the source model's next-token distribution.
        tokens: how many to train on, over all ranks; rounded up to whole steps.
        batch: sequences a step, over all ranks; ``micro``: sequences in memory at a time on a rank
            (by itself 2,048 tokens on a CPU, and as many as fit on a GPU).
        lr, betas, eps, weight_decay, clip: of AdamW (Shortened LLaMA, section 4.1, for cpt and
            lora); weight decay falls on matrices alone.
        warmup: share of the steps over which the learning rate rises; ``final``: share of it that
            the cosine ends at.
        mix: how domains are mixed: ``constant`` (as ``weights`` say, or alike), ``proportional`` to
            their sizes, or ``dynamic`` (Sheared LLaMA, algorithm 1), which needs a reference.
        weights: domain -> share at the start; given for all domains, or none.
        floor, cap: least and largest share of a domain under ``dynamic``.
        update_every: steps between updates of a dynamic mix.
        eval_every: steps between held-out losses; ``eval_sequences``: of each domain, at most.
        save_every: steps between checkpoints; ``keep``: how many are kept.
        temperature: of both distributions in distillation; ``text_share``: how much of the loss is
            that of the text itself; ``hidden_share``: weight of the squared error between hidden
            states, where teacher and student have the same width: those that enter the blocks,
            where the student was made from the teacher, and the last.
        rank, alpha: of LoRA; ``lora_lr``: its peak rate behind CPT, if that is another than ``lr``.
        dtype: what is computed in: ``auto`` is bfloat16 on a GPU and float32 on a CPU.
        optimizer: ``adamw``, or ``adamw8bit``, whose moments take a byte each (torchao).
        weight_dtype: what trained weights are kept in; ``bfloat16`` takes a fourth of the memory
            with ``adamw8bit``, which rounds updates up or down by chance so that small ones count.
        checkpointing: compute blocks' activations anew in the backward pass; by itself where a
            GPU's memory asks for it.
        compile: compile the blocks (off on CPUs, where it gained nothing).
        seed: of the order of data and every draw.
        bos: whether the store's sequences are to begin with BOS; by itself as the tokenizer does.
        trackers: besides log.jsonl: tensorboard, trackio or wandb.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    what: ClassVar[str] = "healing"

    recipe: Recipe = "cpt"
    tokens: int = Field(gt=0)
    batch: _Sequences = 8
    micro: _Sequences | None = None
    lr: float = Field(default=1e-4, gt=0)
    betas: tuple[_Beta, _Beta] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip: float = Field(default=1.0, gt=0)
    warmup: float = Field(default=0.03, ge=0, le=1)
    final: float = Field(default=0.1, ge=0, le=1)
    mix: Literal["constant", "proportional", "dynamic"] = "proportional"
    weights: dict[str, float] | None = None
    floor: float = Field(default=0.0, ge=0, le=1)
    cap: float = Field(default=1.0, gt=0, le=1)
    update_every: int = Field(default=50, gt=0)
    eval_every: int = Field(default=50, gt=0)
    eval_sequences: int = Field(default=16, gt=0)
    save_every: int = Field(default=100, gt=0)
    keep: int = Field(default=2, gt=0)
    temperature: float = Field(default=1.0, gt=0)
    text_share: float = Field(default=0.0, ge=0, le=1)
    hidden_share: float = Field(default=0.0, ge=0)
    rank: int = Field(default=8, gt=0)
    alpha: int = Field(default=16, gt=0)
    lora_lr: float | None = Field(default=None, gt=0)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    weight_dtype: Literal["float32", "bfloat16"] = "float32"
    checkpointing: bool | None = None
    compile: bool = False
    seed: int = Field(default=0, ge=0, le=LARGEST)
    bos: bool | None = None
    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()

    @model_validator(mode="after")
    def _check_weights(self) -> Options:
        if self.weights is not None and abs(sum(self.weights.values()) - 1) > 1e-6:
            raise ValueError(
                f"weights sum to {sum(self.weights.values()):.6g}, but they must sum to 1"
            )
        return self

    @model_validator(mode="after")
    def _check_lora_lr(self) -> Options:
        if self.lora_lr is not None and self.recipe != "cpt-then-lora":
            raise ValueError(f"lora_lr is of cpt-then-lora; the rate of {self.recipe} is lr")
        return self

    @model_validator(mode="after")
    def _check_weight_dtype(self) -> Options:
        if self.weight_dtype == "bfloat16" and self.optimizer != "adamw8bit":
            raise ValueError(
                "weight_dtype=bfloat16 loses small updates unless they are rounded by chance; give "
                "optimizer=adamw8bit with it"
            )
        if self.weight_dtype == "bfloat16" and self.dtype == "float32":
            raise ValueError("weights in bfloat16 are multiplied in bfloat16; leave dtype out")
        return self

    def steps(self, length: int) -> int:
        """Optimiser steps, for sequences of ``length`` tokens."""
        return -(-self.tokens // (self.batch * length))


# Options that mean nothing elsewhere, and where they mean something.
_OF = {
    "recipe=distill": ("temperature", "text_share", "hidden_share"),
    "recipe=lora": ("rank", "alpha"),
    "mix=dynamic": ("floor", "cap", "update_every"),
}


def tell_idle(options: Options, notify: Callable[[str], None]) -> None:
    """Say which options were given another value than their own, and change nothing."""
    at_work = {f"recipe={options.recipe}", f"mix={options.mix}"}
    if options.recipe == "cpt-then-lora":
        at_work.add("recipe=lora")
    for where, names in _OF.items():
        idle = [name for name in names if _changed(options, name)]
        if idle and where not in at_work:
            notify(f"{', '.join(idle)} ignored: of use with {where} alone.")


def _changed(options: Options, name: str) -> bool:
    return getattr(options, name) != type(options).model_fields[name].default


_Kind = TypeVar("_Kind", bound=Options)


def parse(recipe: str, tokens: int, pairs: Sequence[str]) -> Options:
    """Options from the command line's ``key=value`` pairs; ``weights.c4=0.2`` reaches inside.

    Raises:
        ShearlingError: not a pair, an unknown key (the keys are named), or a value that does not
            fit it.
    """
    return validated(pairs_into({"recipe": recipe, "tokens": tokens}, pairs), Options)


def pairs_into(given: Mapping[str, Any], pairs: Sequence[str]) -> dict[str, Any]:
    """``given`` with the values of ``key=value`` pairs over it (ShearlingError if one is none).

    A number reaches into a list, as ``heal.0.lr=1e-4`` does.
    """
    values = deepcopy(dict(given))
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign or not key:
            raise ShearlingError(
                f"{_shown(pair)!r} was given, but options are written as key=value."
            )
        path: list[str] = key.split(".")
        target: Any = values
        for part in path[:-1]:
            if isinstance(target, list):
                target = target[_place(target, part, key)]
            else:
                target[part] = {} if target.get(part) is None else target[part]
                target = target[part]
            if not isinstance(target, dict | list):
                raise ShearlingError(
                    f"{_shown(key)} reaches inside {_shown(part)}, which is one value."
                )
        last: Any = _place(target, path[-1], key) if isinstance(target, list) else path[-1]
        target[last] = parse_yaml(text, f"the value of {_shown(pair)}")
    return values


def _place(values: list[Any], part: str, key: str) -> int:
    """The place in a list that a part of a key names."""
    if not part.isdecimal() or int(part) >= len(values):
        raise ShearlingError(
            f"{_shown(key)} reaches into a list of {len(values)}, where a number from 0 to "
            f"{len(values) - 1} was expected, not {_shown(part)}."
        )
    return int(part)


def validated(values: Mapping[str, Any], kind: type[_Kind]) -> _Kind:
    """Options from a mapping (ShearlingError for the first value that does not fit)."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = _shown(".".join(str(part) for part in first["loc"]))
        if first["type"] == "extra_forbidden":
            raise ShearlingError(
                f"{key} is not an option of {kind.what}; the options are "
                f"{', '.join(kind.model_fields)}{nearest(key, kind.model_fields)}."
            ) from error
        raise ShearlingError(f"{key + ': ' if key else ''}{misfit(first)}.") from error


def _shown(text: str) -> str:
    """A value on one line, or its beginning."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
