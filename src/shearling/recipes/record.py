"""What a run knows of its stages: a small file beside each stage's directory, written last."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from shearling.errors import ShearlingError
from shearling.files.reading import read_json
from shearling.files.remembered import known_digest
from shearling.files.results import ResultFile, entry

# Of a training's checkpoints nothing that comes later depends; with them files are as large again.
_CHECKPOINT = re.compile(r"step-\d{8}")


@dataclass(frozen=True)
class StageInput:
    """Something that a stage was made from."""

    name: str = entry("the file or model as it was called, or the stage that made it")
    place: str = entry("digest of where it lies; empty for what a stage of the run made")
    fingerprint: str = entry("of its content")


@dataclass(frozen=True)
class StageRecord(ResultFile):
    """What a stage of a run is made from, and what it made."""

    kind: ClassVar[str] = "stage"
    written_by: ClassVar[str] = "`run`, beside the directory of each stage"
    advice: ClassVar[str] = "remove it together with the directory beside it, and run again"

    stage: str = entry("`pack`, `prune`, `heal` and the like")
    key: str = entry("SHA-256 of the options and of the inputs' fingerprints")
    whole: bool = entry("false while the stage is worked on")
    options: dict[str, Any] = entry("of the stage", absent={})
    inputs: dict[str, StageInput] = entry("by what they are to the stage", absent={})
    output: str = entry("fingerprint of what was made: of a model its own", absent="")
    files: dict[str, str] = entry(
        "SHA-256 of every file made, by path; hidden ones and checkpoints of a training are not "
        "among them",
        absent={},
    )
    seconds: float | None = entry("of the last call alone", absent=None)

    @classmethod
    def load(cls, file: Path) -> StageRecord | None:
        """The record in a file, or None where there is none (ShearlingError if it is damaged)."""
        return cls.from_json(read_json(file, cls.advice), file) if file.is_file() else None


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file of a stage, by its path below the directory."""
    return {
        file.relative_to(directory).as_posix(): known_digest(file)
        for file in sorted(directory.rglob("*"))
        if file.is_file() and not _passed_over(file.relative_to(directory))
    }


def _passed_over(path: Path) -> bool:
    return any(part.startswith(".") or _CHECKPOINT.fullmatch(part) for part in path.parts)


def check_untouched(directory: Path, record: StageRecord) -> None:
    """Raise ShearlingError if a stage's directory is not what the stage made; one file is named."""
    now = digests(directory)
    for name in sorted({*now, *record.files}):
        if now.get(name) == record.files.get(name):
            continue
        happened = "put there" if name not in record.files else "changed"
        happened = "removed" if name not in now else happened
        raise ShearlingError(
            f"{directory / name} was {happened} after the stage was made; put it right, or remove "
            f"{directory} to have that stage and what depends on it made again."
        )


def joined(values: Mapping[str, Any] | list[Any]) -> str:
    """One digest of plain values."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
