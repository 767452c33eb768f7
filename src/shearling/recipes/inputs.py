"""What stages are made from: where it lies, and its fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shearling.data.domains import find_domains
from shearling.data.store import Store, tokenizer_hash
from shearling.evaluate.tasks.suite import load_suite
from shearling.files.remembered import known_digest
from shearling.files.results import public
from shearling.model.checkpoint import Checkpoint
from shearling.model.resolve import resolve
from shearling.recipes.record import StageInput, StageRecord, joined
from shearling.recipes.stage import Given, Made, Stage

PARTS = ("texts", "tasks", "degeneration")


@dataclass
class Inputs:
    """The inputs of a run's stages.

    Attributes:
        output: the run's directory.
    """

    output: Path
    _given: dict[Given, str] = field(default_factory=dict)

    def paths(self, stage: Stage) -> dict[str, tuple[str, ...]]:
        """Where a stage's inputs lie, or how they are called, by role."""
        return {
            role: tuple(path for one in several for path in self._paths(one))
            for role, several in stage.inputs.items()
        }

    def _paths(self, one: Given | Made) -> tuple[str, ...]:
        if isinstance(one, Given):
            return one.values
        return (str(self.output / one.stage / one.file),)

    def given(self, stage: Stage) -> dict[str, StageInput]:
        """Those from outside of the run, as they are now."""
        return {
            name: StageInput(
                ", ".join(map(_called, one.values)), joined(list(one.values))[:16], self.of(one)
            )
            for name, one in _named(stage)
            if isinstance(one, Given)
        }

    def all(self, stage: Stage, records: Mapping[str, StageRecord]) -> dict[str, StageInput] | None:
        """Every input of a stage; None where one is not made yet."""
        found = self.given(stage)
        for name, one in _named(stage):
            if isinstance(one, Given):
                continue
            record = records.get(one.stage)
            if record is None:
                return None
            made = record.files.get(one.file, "") if one.file else record.output
            found[name] = StageInput(one.stage, "", made)
        return found

    def of(self, one: Given) -> str:
        """The fingerprint of something given."""
        if one not in self._given:
            self._given[one] = _fingerprint(one)
        return self._given[one]


def _named(stage: Stage) -> list[tuple[str, Given | Made]]:
    """Inputs by name: their role, and a number where it has several."""
    return [
        (role if len(several) == 1 else f"{role}.{number}", one)
        for role, several in stage.inputs.items()
        for number, one in enumerate(several)
    ]


def _called(value: str) -> str:
    """What something given is called: of absolute paths the last part, behind a domain's name."""
    name, equals, path = value.partition("=")
    return f"{name}={public(path)}" if equals and not name.startswith("/") else public(value)


def _fingerprint(one: Given) -> str:
    """Of a model, what makes it this one; of text, every file."""
    if one.of == "text":
        return joined(
            [
                (domain, source.name, known_digest(source.file))
                for domain, sources in find_domains(one.values).items()
                for source in sources
            ]
        )
    (value,) = one.values
    if one.of == "suite":
        return _suite(value)
    if one.of == "model":
        return Checkpoint.open(value).fingerprint
    if one.of == "tokenizer":
        return tokenizer_hash(resolve(value))
    assert one.of == "store"
    return Store.open(Path(value)).fingerprint


def _suite(name: str) -> str:
    """Of a suite, what it asks and the files it asks it of."""
    _, suite = load_suite(name)
    files = [one.file for one in (*suite.texts, *suite.tasks, *suite.degeneration) if one.file]
    asked = suite.model_dump(mode="json", exclude={part: {"__all__": {"file"}} for part in PARTS})
    return joined([asked, [_fingerprint(Given("text", (str(file),))) for file in files]])
