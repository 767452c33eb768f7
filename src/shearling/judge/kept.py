"""Lines on disk, each under a key made of all it depends on: what is there is not made again."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from shearling.errors import ShearlingError
from shearling.files.reading import json_object, read_bytes
from shearling.files.results import Misfit, UnfitFile, read_object
from shearling.files.writer import disk_errors
from shearling.judge.template import Verdict


def key_of(*parts: Any) -> str:
    """SHA-256 over what a line depends on, as canonical JSON."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


ADVICE = "remove that line, and run again"


@dataclass(frozen=True)
class _Line:
    key: str


@dataclass(frozen=True)
class KeptAnswer:
    """What a model said to a prompt."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class KeptVerdict:
    """What a judge said of two answers; None where that could not be read."""

    verdict: str | None

    def __post_init__(self) -> None:
        """Refuse what is no verdict."""
        if self.verdict not in (None, *get_args(Verdict)):
            raise Misfit("verdict", f"null, {', '.join(get_args(Verdict))}", self.verdict)


class KeptLines:
    """A file of JSON lines that is only ever added to, from any thread, a whole line at a time.

    A last line that a kill cut short is dropped when it is next added to.

    Args:
        file: the lines.
        of: a dataclass of what a line holds besides its key.

    Raises:
        ShearlingError: a line other than the last is damaged.
    """

    def __init__(self, file: Path, of: type[Any] | None = None) -> None:
        """Read what is there."""
        self.file = file
        self._of = of
        self._lock = threading.Lock()
        self._whole = 0  # bytes of whole lines
        self._lines = self._read()

    def _read(self) -> dict[str, Mapping[str, Any]]:
        kept: dict[str, Mapping[str, Any]] = {}
        content = read_bytes(self.file, ADVICE) if self.file.is_file() else b""
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json_object(line, "it", ADVICE)
                key = read_object(_Line, record, self.file).key
                if self._of is not None:
                    read_object(self._of, record, self.file)
            except ShearlingError as error:
                why = error.reason if isinstance(error, UnfitFile) else str(error).split("; ")[0]
                raise ShearlingError(
                    f"line {number} of {self.file} is damaged ({why}); {ADVICE}."
                ) from error
            kept[key] = record
            self._whole += len(line)
        return kept

    def get(self, key: str) -> Mapping[str, Any] | None:
        """The line under ``key``, if there is one."""
        return self._lines.get(key)

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Append a line; it is on its way to disk when this returns.

        Raises:
            ShearlingError: the disk ran full.
        """
        line = {"key": key} | dict(record)
        data = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        with self._lock, disk_errors(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab") as stream:
                os.truncate(stream.fileno(), self._whole)
                stream.write(data)
            self._whole += len(data)
            self._lines[key] = line
