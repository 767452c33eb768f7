"""What is measured of a model: a suite, built in or a YAML file of the user's."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from shearling.errors import ShearlingError, misfit
from shearling.files.reading import check_size, parse_yaml

BUILT_IN = ("abilities", "retention", "shortened", "sheared")
CUSTOM = "custom"  # the name of a suite made of options alone
HubText = Literal["wikitext2", "ptb"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _OfText(_Strict):
    """Where text comes from: a file or directory of the user's, or the hub."""

    file: Path | None = None
    hub: HubText | None = None

    @model_validator(mode="after")
    def _one_source(self) -> _OfText:
        if (self.file is None) == (self.hub is None):
            raise ValueError("give either file (a path) or hub (wikitext2 or ptb)")
        return self

    @property
    def label(self) -> str:
        """What results call the text."""
        return self.hub or (self.file.resolve().name if self.file else "")

    @property
    def stem(self) -> str:
        """What files of results are called after."""
        return self.hub or (self.file.stem if self.file else "")


class PerplexityText(_OfText):
    """A text for perplexity; the options are those of ``shearling eval --text``."""

    window: int = Field(default=512, ge=2)
    max_windows: int | None = Field(default=None, ge=1)
    bos: bool | None = None  # None follows the tokenizer


class DegenerationText(_OfText):
    """Continuations of a text, and how often they repeat themselves.

    Attributes:
        prompts: how many; ``prompt_tokens`` and ``new_tokens``: how long.
        bos: whether prompts follow a BOS; None follows the tokenizer.
        temperature: 0 is greedy; ``top_p`` as in nucleus sampling.
    """

    prompts: int = Field(default=64, ge=1)
    prompt_tokens: int = Field(default=32, ge=1)
    new_tokens: int = Field(default=128, ge=4)
    bos: bool | None = None
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)


class Task(_Strict):
    """A task: one of lm-eval's by ``name``, or a ``file`` of questions.

    Attributes:
        name: lm-eval's name, a group's or a tag's as well; of a file, what results call it (by
            default the file's own name).
        shots: examples before each question; None takes what the task says, else none.
        metric: the one that counts in the average, with the filter of its answers where there are
            several (``exact_match,flexible-extract``); None takes acc_norm, or else acc.
    """

    name: str | None = None
    file: Path | None = None
    shots: int | None = Field(default=None, ge=0)
    metric: str | None = None

    @model_validator(mode="after")
    def _named(self) -> Task:
        if self.name is None and self.file is None:
            raise ValueError("give name (a task of lm-eval) or file (questions of yours)")
        return self

    @property
    def label(self) -> str:
        """What results call the task."""
        return self.name or (self.file.stem if self.file else "")


class AbilityItems(_Strict):
    """Items that are made from the seed, of all abilities.

    Attributes:
        limit: of each ability; None asks all.
        bos: whether each prompt follows a BOS; None follows the tokenizer.
    """

    limit: int | None = Field(default=None, ge=1)
    bos: bool | None = None


class Suite(_Strict):
    """Texts, tasks, abilities and degeneration to measure, in this order."""

    texts: tuple[PerplexityText, ...] = ()
    tasks: tuple[Task, ...] = ()
    abilities: tuple[AbilityItems, ...] = Field(default=(), max_length=1)
    degeneration: tuple[DegenerationText, ...] = ()

    @field_validator("tasks", mode="before")
    @classmethod
    def _bare_names(cls, given: Any) -> Any:
        if not isinstance(given, list):
            return given
        return [{"name": task} if isinstance(task, str) else task for task in given]

    @field_validator("abilities", "degeneration", mode="before")
    @classmethod
    def _one_is_a_list(cls, given: Any) -> Any:
        return [given] if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _no_name_twice(self) -> Suite:
        for what, labels in (
            ("tasks", [task.label for task in self.tasks]),
            ("texts", [text.stem for text in self.texts]),
        ):
            twice = sorted({label for label in labels if labels.count(label) > 1})
            if twice:
                raise ValueError(
                    f"two {what} are called {twice[0]}, so that one's results would take the "
                    "other's place; give them names of their own"
                )
        return self

    @property
    def empty(self) -> bool:
        """Whether there is nothing to measure."""
        return not (self.texts or self.tasks or self.abilities or self.degeneration)


def load_suite(name: str) -> tuple[str, Suite]:
    """A suite and its name: a built-in one, or the YAML file at a path.

    Raises:
        ShearlingError: neither, or a file that is no suite; the message names the first mistake.
    """
    if name in BUILT_IN:
        text = (files("shearling.evaluate") / "suites" / f"{name}.yaml").read_text("utf-8")
        return name, _parse(text, name)
    path = Path(name)
    if not path.is_file():
        raise ShearlingError(
            f"--suite {name} is neither built in ({', '.join(BUILT_IN)}) nor a file; give one of "
            "these, or a YAML file with texts, tasks, abilities or degeneration."
        )
    check_size(path)
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ShearlingError(f"The suite {path} is not UTF-8 text; give a YAML file.") from error
    suite = _parse(text, str(path))
    if suite.empty:
        raise ShearlingError(
            f"The suite {path} is empty; give it texts, tasks, abilities or degeneration."
        )
    return path.stem, _relative_to(suite, path.parent)


def build_suite(**parts: Any) -> Suite:
    """A suite from options of the command line (ShearlingError for what does not fit)."""
    return _validated(parts, "These options")


def merged(one: Suite, other: Suite) -> Suite:
    """Both, the second's parts behind the first's (ShearlingError if names collide)."""
    parts = {key: getattr(one, key) + getattr(other, key) for key in Suite.model_fields}
    return _validated(parts, "The suite with these options")


def _parse(text: str, where: str) -> Suite:
    values = parse_yaml(text, f"The suite {where}")
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ShearlingError(
            f"The suite {where} is not a mapping; give texts:, tasks:, abilities: or degeneration:."
        )
    return _validated(values, f"The suite {where}")


def _validated(values: dict[str, Any], what: str) -> Suite:
    try:
        return Suite.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"]]
        if first["type"] == "extra_forbidden":
            kinds: dict[str, type[BaseModel]] = {
                "texts": PerplexityText, "tasks": Task, "abilities": AbilityItems,
                "degeneration": DegenerationText,
            }  # fmt: skip
            kind = kinds.get(path[0], Suite) if len(path) > 1 else Suite
            raise ShearlingError(
                f"{what} has the key {'.'.join(path)}, which is not known; the keys there are "
                f"{', '.join(kind.model_fields)}."
            ) from error
        where = f" at {'.'.join(path)}" if path else ""
        raise ShearlingError(f"{what} cannot be used{where}: {misfit(first)}.") from error


def _relative_to(suite: Suite, directory: Path) -> Suite:
    """Paths of a suite's file are relative to where it lies."""

    def placed(part: Any) -> Any:
        file = getattr(part, "file", None)
        return part if file is None else part.model_copy(update={"file": directory / file})

    return suite.model_copy(
        update={key: tuple(map(placed, getattr(suite, key))) for key in Suite.model_fields}
    )
