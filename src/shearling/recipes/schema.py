"""What a recipe may say: every section is a frozen model whose fields describe themselves.

Options that a command has already are checked by that command's own classes, so that a recipe takes
what the command line takes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from shearling.data.seeds import LARGEST
from shearling.errors import ShearlingError
from shearling.gates.options import RECIPES, LearnOptions
from shearling.pruning.plan import parse_count
from shearling.repair.openings import WrittenFrom
from shearling.train.options import Options, Recipe, validated

VERSION = 1  # raised when what a recipe says would mean something else
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, le=LARGEST)]
Reference = Literal["source"] | dict[str, float]


def says(text: str, default: Any = ..., **limits: Any) -> Any:
    """A field and what docs/recipes.md says of it."""
    return Field(default=default, description=text, **limits)


class RecipeSection(BaseModel):
    """A part of a recipe; a key that it does not have is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @property
    def options(self) -> dict[str, Any]:
        """Keys that are a command's own options, where a section takes such."""
        return dict(self.model_extra or {})


class DataSection(RecipeSection):
    """Text, packed once into a token store, or a store that is there."""

    text: str | list[str] | dict[str, str] | None = says(
        "Files, directories or globs: one, several, or `domain: path`; as `shearling pack`.", None
    )
    store: str | None = says("A token store of `shearling pack`, in place of `text`.", None)
    calibration: str | list[str] | dict[str, str] | None = says(
        "Text to score and repair with, as `shearling prune --calibration`: one, several, or "
        "`name: path` (with `:share` behind, such as `web: c4.jsonl:0.7`); else windows of what is "
        "trained on.",
        None,
    )
    length: int = says("Tokens in each sequence.", 512, ge=2)
    held_out: float = says("Share of the documents that is not trained on.", 0.02, ge=0, lt=1)
    bos: bool | None = says("Begin sequences with BOS; null as the tokenizer does.", None)

    @model_validator(mode="after")
    def _one_source(self) -> DataSection:
        if (self.text is None) == (self.store is None):
            raise ValueError("give either text (files) or store (a token store)")
        return self

    @property
    def specs(self) -> tuple[str, ...]:
        """The text as ``shearling pack`` takes it."""
        if isinstance(self.text, dict):
            return tuple(f"{domain}={path}" for domain, path in self.text.items())
        return (self.text,) if isinstance(self.text, str) else tuple(self.text or ())

    @property
    def calibrated(self) -> tuple[str, ...]:
        """The calibration text as ``shearling prune`` takes it."""
        given = self.calibration
        if isinstance(given, dict):
            return tuple(f"{name}={path}" for name, path in given.items())
        return (given,) if isinstance(given, str) else tuple(given or ())


class TargetSection(RecipeSection):
    """How much is left: a size, `layers` and `remove` that agree, or targets that are all met."""

    shape: dict[str, int | str] | None = says(
        "Sizes by axis; a share such as `0.75x` is of the source's, rounded down.", None
    )
    params: str | int | None = says("Parameters, such as `0.8x` or `113M`.", None)
    active_params: str | int | None = says("Of a mixture: those that one token meets.", None)
    layers: int | None = says("Blocks to keep.", None, ge=1)
    remove: list[int] | None = says("Blocks to remove, from 0.", None)
    speed: str | None = says("Decode speed over the source's on this machine: `1.3x`.", None)
    latency: str | None = says("Time of a new token on this machine: `20ms`.", None)
    footprint: str | None = says("Memory of weights and KV cache: `8GB` or `0.7x`.", None)
    prefer: Literal["quality", "balanced", "speed"] | None = says(
        "What a number of parameters or a target cares for most; null is `balanced`.", None
    )
    engine: Literal["transformers", "llama.cpp", "vllm"] = says(
        "What `speed` and `latency` are timed with.", "transformers"
    )
    batch: Count = says("Sequences at a time, for targets.", 1)
    prompt: Count = says("Prompt tokens that are timed.", 128)
    new: Count = says("Generated tokens that are timed.", 64)
    context: int | None = says(
        "Of `footprint`: tokens of each sequence; null the model's positions, at most 4096.",
        None, ge=1,
    )  # fmt: skip
    threads: int | None = says("CPU threads that are timed.", None, ge=1)

    @model_validator(mode="after")
    def _something(self) -> TargetSection:
        named = {key for key in ("shape", "layers", "remove") if getattr(self, key) is not None}
        if not (named or self.targets or self.sizes):
            raise ValueError("nothing says how much to cut; give shape, params or layers")
        if named and self.targets:
            raise ValueError(
                f"{min(self.targets)} chooses a shape and {min(named)} names one; give one of them"
            )
        return self

    @property
    def targets(self) -> dict[str, str]:
        """Targets that ask for more than a number of parameters."""
        given = {"speed": self.speed, "latency": self.latency, "footprint": self.footprint}
        return {name: text for name, text in given.items() if text is not None}

    @property
    def timed(self) -> bool:
        """Whether a target has to be timed."""
        return bool({"speed", "latency"} & self.targets.keys())

    @property
    def sizes(self) -> dict[str, Any]:
        """What names a size, and what it prefers."""
        kept = {"shape", "params", "active_params", "layers", "remove", "prefer"}
        given = self.model_dump(include=kept, exclude_none=True)
        return {} if given.keys() <= {"prefer"} else given


class ScoresMethod(RecipeSection):
    """The units that matter least go, at once: `shearling prune`."""

    kind: Literal["scores", "blocks"] = says(
        "`scores` cuts what promises the least damage, `blocks` whole blocks alone.", "scores"
    )
    criteria: str | None = says("As `shearling prune --by`; null takes the default.", None)
    protect_first: int | None = says("Never remove the first so many blocks.", None, ge=0)
    protect_last: int | None = says("Never remove the last so many blocks.", None, ge=0)
    keep_pattern: bool = says("Leave blocks of each kind where llama.cpp wants them.", False)
    refit: bool | None = says("Solve what writes into the stream anew after the cut.", None)
    rotate: bool | None = says("Cut `hidden` in the stream's principal axes.", None)
    final_norm: bool | None = says("Fit the final norm's gain after the repair.", None)
    samples: int = says("Calibration windows.", 64, ge=1)
    length: int = says("Tokens in each window.", 256, ge=2)
    copies: int | None = says("Rewritten copies of the windows for the repair.", None, ge=0, le=9)
    written: int | None = says("Sequences that the source writes for the repair.", None, ge=0)
    written_from: WrittenFrom = says(
        "What they begin with: `text`, the chat `template`, or `both`.", "text"
    )


class GatesMethod(RecipeSection):
    """What stays is learned while training; also takes every option of `shearling learn`."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    kind: Literal["gates"] = says("`gates`.")
    recipe: str = says("`warm`, `sheared` or `scores`, as `shearling learn --recipe`.", "warm")
    tokens: str | int = says("How many to train on, such as `400M`.")
    distil: bool = says("Learn from the source's distribution instead of the text.", False)
    reference: Reference = says(
        "Losses for `mix: dynamic`: `source` measures them, or `domain: loss`.", "source"
    )

    @field_validator("tokens")
    @classmethod
    def _counted(cls, given: str | int) -> int:
        return parse_count(str(given), "tokens")

    @model_validator(mode="after")
    def _known(self) -> GatesMethod:
        self.learning({})
        return self

    def learning(self, defaults: dict[str, Any]) -> LearnOptions:
        """The options of ``shearling learn`` (ShearlingError for one that it does not have)."""
        if self.recipe not in RECIPES:
            raise ShearlingError(
                f"the recipe {self.recipe!r} of gates is not known; choose one of "
                f"{', '.join(RECIPES)}"
            )
        fixed = {"recipe": "distill" if self.distil else "cpt", "tokens": self.tokens}
        return validated(defaults | RECIPES[self.recipe] | self.options | fixed, LearnOptions)


class HealSection(RecipeSection):
    """Retraining after a cut; also takes every option of `shearling heal`."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    recipe: Recipe = says("`cpt`, `lora`, `cpt-then-lora` or `distill` (from the source).", "cpt")
    tokens: str | int | None = says("How many to train on, such as `20M`.", None)
    epochs: float | None = says("In place of `tokens`: how often all of the data.", None, gt=0)
    data: DataSection | None = says("Other data than the recipe's.", None)
    reference: Reference = says(
        "Losses for `mix: dynamic`: `source` measures them, or `domain: loss`.", "source"
    )

    @field_validator("tokens")
    @classmethod
    def _counted(cls, given: str | int | None) -> int | None:
        return None if given is None else parse_count(str(given), "tokens")

    @model_validator(mode="after")
    def _known(self) -> HealSection:
        if (self.tokens is None) == (self.epochs is None):
            raise ValueError("give either tokens or epochs")
        self.healing({}, self.tokens or 1)
        return self

    def healing(self, defaults: dict[str, Any], tokens: str | int) -> Options:
        """The options of ``shearling heal`` (ShearlingError for one that it does not have)."""
        fixed = {"recipe": self.recipe, "tokens": tokens}
        return validated(defaults | self.options | fixed, Options)


Method = Annotated[ScoresMethod | GatesMethod, Field(discriminator="kind")]
Heals = HealSection | list[HealSection]


class _Cutting(RecipeSection):
    """What a recipe and each of its steps have in common."""

    @model_validator(mode="before")
    @classmethod
    def _written_short(cls, given: Any) -> Any:
        """A method without a kind is scores, and one healing is a list of one."""
        if not isinstance(given, dict):
            return given
        given = dict(given)
        if isinstance(method := given.get("method"), dict):
            given["method"] = {"kind": "scores"} | method
        if isinstance(given.get("heal"), dict):
            given["heal"] = [given["heal"]]
        return given


class StepSection(_Cutting):
    """One cut of several; what it does not say is the recipe's."""

    target: TargetSection = says("How much is left after this step; shares are of the source.")
    method: Method | None = says("How this step cuts.", None)
    heal: list[HealSection] | None = says("How this step heals.", None)


class EvaluateSection(RecipeSection):
    """What is measured of the source and of every model made."""

    models: Literal["all", "ends"] = says("Every model made, or the source and the last.", "all")
    held_out: bool = says("Perplexity on held-out text of the data.", True)
    windows: Count = says("Windows of each text.", 32)
    window: int = says("Tokens in each window.", 512, ge=2)
    text: str | list[str] = says("Further texts for perplexity.", [])
    suite: str | None = says("`shortened`, `sheared` or a YAML file of texts and tasks.", None)
    limit: int | None = says("Questions of each task.", None, ge=1)
    prompts: list[str] = says("Prompts that every model continues.", [])
    max_new_tokens: Count = says("Tokens after each prompt.", 64)

    @property
    def texts(self) -> tuple[str, ...]:
        """The further texts."""
        return (self.text,) if isinstance(self.text, str) else tuple(self.text)


class BenchSection(RecipeSection):
    """Speed and memory of the same models, in turns: `shearling bench`."""

    batches: list[Count] = says("Batch sizes.", [1])
    prompts: list[Count] = says("Prompt tokens.", [128])
    new: list[Count] = says("Generated tokens.", [32])
    repeats: Count = says("Timed rounds.", 3)
    budget: float | None = says("Seconds for all of it.", None, gt=0)
    threads: int | None = says("CPU threads.", None, ge=1)


class ReportSection(RecipeSection):
    """The pages at the end."""

    within: float = says(
        "Per cent of the source's quality that the pick may lose.", 5.0, ge=0, le=100
    )


class WholeRecipe(_Cutting):
    """All of a recipe."""

    shearling: int = says("Version of this form: 1.")
    about: str = says("One sentence on what it is for.", "")
    source: str | None = says("A model directory, a `.gguf` file or a hub id.", None)
    data: DataSection | None = says("Text to calibrate, heal and measure with.", None)
    target: TargetSection | None = says("How much is left.", None)
    method: Method = says("How it is cut; `kind` is `scores`, `blocks` or `gates`.", ScoresMethod())
    heal: list[HealSection] = says("How it is healed: one section, several, or null.", [])
    steps: list[StepSection] = says("In place of `target`: several cuts, one after another.", [])
    evaluate: EvaluateSection | None = says(
        "What is measured; null for nothing.", EvaluateSection()
    )
    bench: BenchSection | None = says("What is timed; null for nothing.", None)
    report: ReportSection | None = says("The pages at the end; null for none.", ReportSection())
    device: str = says("What computes: `auto`, `cpu`, `cuda` or `cuda:N`.", "auto")
    dtype: Literal["auto", "float32", "bfloat16"] = says("What is computed in.", "auto")
    seed: Seed = says("Of every random choice.", 0)

    @field_validator("heal", mode="before")
    @classmethod
    def _none_is_empty(cls, given: Any) -> Any:
        return [] if given is None else given

    @model_validator(mode="after")
    def _one_target(self) -> WholeRecipe:
        if bool(self.steps) == (self.target is not None):
            raise ValueError("give either target (one cut) or steps (several, each with a target)")
        return self

    @property
    def cuts(self) -> tuple[StepSection, ...]:
        """Every cut, with what the recipe says of all."""
        only = () if self.target is None else (StepSection(target=self.target),)
        return tuple(
            step.model_copy(
                update={
                    "method": step.method or self.method,
                    "heal": self.heal if step.heal is None else step.heal,
                }
            )
            for step in self.steps or only
        )
