"""Results of tasks that were run before, by the model's fingerprint and all else that counts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError
from shearling.files.cache import cache_directory
from shearling.files.reading import read_json
from shearling.files.writer import file_digest, write_json
from shearling.model.side_files import side_files
from shearling.model.subject import OpenedModel

FORMAT = 1  # raised when results of the same manifest would differ, or look different


def manifest(subject: OpenedModel, **what: Any) -> dict[str, Any]:
    """All that a result depends on: the model, its tokenizer and what was asked."""
    return {
        "format": FORMAT,
        "model": subject.fingerprint,
        "tokenizer": tokenizer_digest(subject.path),
        **what,
    }


def tokenizer_digest(directory: Path) -> str:
    """SHA-256 of a directory's tokenizer, which a model's fingerprint does not cover."""
    digest = hashlib.sha256()
    for file in side_files(directory):
        digest.update(f"{file.relative_to(directory)} {file_digest(file)}\n".encode())
    return digest.hexdigest()


def recall(key: dict[str, Any]) -> dict[str, Any] | None:
    """The result kept for a manifest, or None; a damaged file counts as none."""
    try:
        kept = read_json(_file(key))
    except ShearlingError:
        return None
    result = kept.get("result")
    return result if kept.get("manifest") == key and isinstance(result, dict) else None


def keep(key: dict[str, Any], result: dict[str, Any]) -> bool:
    """Keep a result; whether it could be: a full or read-only cache stops no measurement."""
    try:
        write_json(_file(key), {"manifest": key, "result": result})
    except (OSError, ShearlingError):
        return False
    return True


def _file(key: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_directory() / "tasks" / key["model"][:16] / f"{digest[:24]}.json"
