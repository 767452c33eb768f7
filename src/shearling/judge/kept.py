"""Lines on disk, each under a key made of all it depends on: what is there is not made again."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError
from shearling.files.writer import disk_errors


def key_of(*parts: Any) -> str:
    """SHA-256 over what a line depends on, as canonical JSON."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class KeptLines:
    """A file of JSON lines that is only ever added to, from any thread, a whole line at a time.

    A last line that a kill cut short is dropped when it is next added to.
    """

    def __init__(self, file: Path) -> None:
        """Read what is there.

        Raises:
            ShearlingError: a line other than the last is damaged.
        """
        self.file = file
        self._lock = threading.Lock()
        self._whole = 0  # bytes of whole lines
        self._lines = self._read()

    def _read(self) -> dict[str, Mapping[str, Any]]:
        found: dict[str, Mapping[str, Any]] = {}
        content = self.file.read_bytes() if self.file.is_file() else b""
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                found[record["key"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise ShearlingError(
                    f"line {number} of {self.file} is damaged; remove that line, and run again."
                ) from error
            self._whole += len(line)
        return found

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
