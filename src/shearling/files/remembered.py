"""What was found out about a file, kept in the cache directory until the file changes.

A file is known by device, inode, size, and the times, to the nanosecond, of the last change of its
content and of its inode. The last of these cannot be set back. Of a file that was changed a moment
ago nothing is kept, as a second change might fall within the same tick of the file system's clock.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError
from shearling.files.cache import cache_directory
from shearling.files.reading import read_json
from shearling.files.writer import file_digest, write_json

SETTLED_SECONDS = 2.0  # the coarsest clock of a file system in use, FAT's


def known_digest(file: Path) -> str:
    """SHA-256 of a file's bytes, read once as long as the file does not change."""
    stat = file.stat()
    digest = recall("digests", 1, stat).get("sha256")
    if not isinstance(digest, str):
        digest = file_digest(file)
        keep("digests", 1, file, stat, {"sha256": digest})
    return digest


def recall(folder: str, version: int, stat: os.stat_result) -> Mapping[str, Any]:
    """What was kept of a file; nothing where nothing was, or it is damaged.

    Args:
        folder: of the cache directory.
        version: of what is kept there.
        stat: of the file.
    """
    try:
        return read_json(_place(folder, version, stat))
    except ShearlingError:
        return {}


def keep(
    folder: str, version: int, file: Path, stat: os.stat_result, values: Mapping[str, Any]
) -> None:
    """Keep values, if the file was left alone since ``stat``; an unwritable cache is none."""
    place = _place(folder, version, stat)
    if _place(folder, version, file.stat()) != place:
        return
    if time.time() - max(stat.st_mtime, stat.st_ctime) < SETTLED_SECONDS:
        return
    try:
        write_json(place, {"file": str(file), **values})
    except (OSError, ShearlingError):
        return


def _place(folder: str, version: int, stat: os.stat_result) -> Path:
    """Where what is known of a file is kept."""
    known_by = (
        version, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
    )  # fmt: skip
    name = hashlib.sha256(repr(known_by).encode()).hexdigest()[:32]
    return cache_directory() / folder / f"{name}.json"
