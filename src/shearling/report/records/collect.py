"""Finds result files under directories and joins them into what one report is about."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError
from shearling.report.records.readers import READERS, read
from shearling.report.records.records import Records
from shearling.report.records.results import Results, join_records

LARGEST = 20_000_000  # bytes; a tokenizer can be that large, a result never is
OUR_NAMES = (
    *("shearling", "scores-", "unit-scores", "evaluation-", "damage", "bench", "generations"),
    *("healing", "learning", "tasks", "degeneration", "judgement", "abilities", "family"),
)


def collect(directories: Sequence[Path]) -> Results:
    """Read every result file under the directories, joined by model fingerprint.

    Raises:
        ShearlingError: a directory is not there or holds no result, or a result file is damaged.
    """
    if not directories:
        raise ShearlingError(
            "No directory was given to report on; give at least one, such as the output directory "
            "of `shearling prune`."
        )
    records = Records()
    seen: set[Path] = set()
    for directory in directories:
        if not directory.is_dir():
            raise ShearlingError(
                f"{directory} is not a directory; report expects directories with result files, "
                "such as the output directory of `shearling prune`."
            )
        if not read_directory(directory, records, seen):
            raise ShearlingError(
                f"{directory} holds no result of shearling; report expects JSON files as "
                "`shearling score`, `prune`, `eval` or `bench` write them, there or in a "
                "directory below."
            )
    return join_records(records)


def read_directory(directory: Path, records: Records, seen: set[Path]) -> int:
    """Read the results under one directory; returns how many there are.

    Args:
        directory: looked through to any depth.
        records: what is read is added here.
        seen: files read before, which are not read again; those read now are added.

    Raises:
        ShearlingError: a result file is damaged.
    """
    count = 0
    for path in _json_files(directory):
        values = _load(path)
        if values is None:
            continue
        count += 1
        if path.resolve() not in seen:
            seen.add(path.resolve())
            read(path, values, records)
    return count


def _json_files(directory: Path) -> Iterator[Path]:
    """All ordinary *.json files below, sorted, without following links.

    Hidden directories are left out: an output that is still being written lies in one.
    """
    for folder, subfolders, names in os.walk(directory):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if name.endswith(".json") and not path.is_symlink() and path.is_file():
                yield path


def _load(path: Path) -> dict[str, Any] | None:
    """The object in a result file, or None for a file that is none of ours."""
    try:
        if path.stat().st_size > LARGEST:
            return None
        values = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        if not _looks_like_ours(path):
            return None
        raise ShearlingError(
            f"{path} is nested too deeply to be a result file of shearling; write it again with "
            "the command that made it, or move it away."
        ) from error
    except OSError as error:
        raise ShearlingError(
            f"{path} cannot be read ({error.strerror}); make it readable or move it away."
        ) from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        if not _looks_like_ours(path):
            return None
        raise ShearlingError(
            f"{path} is not whole JSON, as a result file of shearling has to be ({error}); "
            "write it again with the command that made it, or move it away."
        ) from error
    if isinstance(values, dict) and isinstance(kind := values.get("kind"), str):
        return values if kind in READERS else None
    return None


def _looks_like_ours(path: Path) -> bool:
    if path.name.startswith(OUR_NAMES):
        return True
    head = path.read_bytes()[:4096]
    return b'"kind"' in head and b'"shearling"' in head
