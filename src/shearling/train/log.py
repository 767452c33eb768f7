"""The run's history: one JSON object a line, always; other trackers if the user has them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError
from shearling.files.json_text import json_text
from shearling.files.reading import json_object, read_bytes
from shearling.files.results import entry, read_object, refuse
from shearling.train.installed import no_tracker

FILE = "log.jsonl"
ADVICE = "remove that line, or move the file away, and give the same command again"


class Log:
    """Appends records; a resumed run first drops what was logged after its checkpoint."""

    def __init__(self, folder: Path, *, after: int, trackers: Sequence[str] = ()) -> None:
        """Open the log of a run that goes on behind step ``after``."""
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / FILE
        # Held-out losses of the step it goes on from are measured again.
        kept = [
            line
            for line in _lines(self.file)
            if line["step"] < after or (line["step"] == after and line["kind"] == "train")
        ]
        staging = self.file.with_suffix(".partial")
        staging.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(staging, self.file)
        self._stream = self.file.open("a", encoding="utf-8")
        self._trackers = [_tracker(name, folder) for name in trackers]

    def write(self, record: Mapping[str, Any]) -> None:
        """One line; it has a ``step`` and a ``kind``."""
        self._stream.write(json_text(record, ascii_only=True) + "\n")
        self._stream.flush()
        for tracker in self._trackers:
            tracker.write(record)

    def close(self) -> None:
        """Close the file, and have trackers finish what they were told."""
        self._stream.close()
        for tracker in self._trackers:
            tracker.close()


class NoLog(Log):
    """The log of ranks that write none."""

    def __init__(self) -> None:
        """Open nothing."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Write nothing."""

    def close(self) -> None:
        """Close nothing."""


def read(folder: Path) -> list[dict[str, Any]]:
    """All records of a run, oldest first."""
    return _lines(folder / FILE)


@dataclass(frozen=True)
class TrainLine:
    """A step of training, as its line of the log has to be."""

    step: int
    tokens: int
    loss: float
    seconds: float | None = entry("of this run until then", absent=None)
    gates: dict[str, Any] | None = entry("of a learning run", absent=None)


@dataclass(frozen=True)
class EvalLine:
    """Held-out losses, as their line of the log has to be."""

    step: int
    tokens: int
    losses: dict[str, float]
    weights: dict[str, float]


LINES: dict[str, type[TrainLine] | type[EvalLine]] = {"train": TrainLine, "eval": EvalLine}


def _lines(file: Path) -> list[dict[str, Any]]:
    """The records of a log, without a last line that a kill cut short.

    Raises:
        ShearlingError: another line is damaged; it is named.
    """
    if not file.exists():
        return []
    records = []
    lines = [line for line in read_bytes(file, ADVICE).split(b"\n") if line.strip()]
    for number, line in enumerate(lines, 1):
        try:
            record = json_object(line, f"line {number} of {file}", ADVICE)
        except ShearlingError:
            if number < len(lines):
                raise
            break
        of = LINES.get(str(record.get("kind")))
        if of is None:
            refuse(file, f"line {number}: kind", "train or eval", record.get("kind", MISSING))
        read_object(of, record, file, f"line {number}: ")
        records.append(record)
    return records


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a record by dotted name."""
    numbers: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            numbers |= _flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            numbers[f"{prefix}{key}"] = float(value)
    return numbers


@dataclass(frozen=True)
class _Tracker:
    """What takes records, and what ends it."""

    write: Callable[[Mapping[str, Any]], None]
    close: Callable[[], None]


def _tracker(name: str, folder: Path) -> _Tracker:
    """A tracker of a run; libraries are imported only when they are asked for."""
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder / "tensorboard"))

            def to_tensorboard(record: Mapping[str, Any]) -> None:
                for key, value in _flat(record).items():
                    writer.add_scalar(key, value, record["step"])

            return _Tracker(to_tensorboard, writer.close)
        library: Any = __import__(name)
    except ImportError as error:
        raise no_tracker(name) from error
    output = folder.resolve().parent.parent  # the folder is that of a phase of OUTPUT/healing
    run = library.init(project="shearling", name=f"{output.name} {folder.name}")
    told = run if hasattr(run, "log") else library

    def to_run(record: Mapping[str, Any]) -> None:
        told.log(_flat(record), step=record["step"])

    return _Tracker(to_run, run.finish if hasattr(run, "finish") else library.finish)
