"""What every file of ours says of itself, and the lineage that lies beside a model."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shearling.files.reading import read_json
from shearling.files.results import now
from shearling.model.refs import Identified, ModelRef
from shearling.model.subject import OpenedModel
from shearling.version import __version__

MANIFEST = "shearling.json"


def stamp(checkpoint: OpenedModel | None = None) -> dict[str, Any]:
    """The fields that all files share; ``model`` if one is meant."""
    fields: dict[str, Any] = {
        "shearling": __version__,
        "created": now(),
    }
    return fields if checkpoint is None else fields | {"model": identity(checkpoint)}


def identity(checkpoint: OpenedModel) -> dict[str, str]:
    """A model's name and fingerprint."""
    return {"name": checkpoint.name, "fingerprint": checkpoint.fingerprint}


def ref(checkpoint: Identified) -> ModelRef:
    """A model's name and fingerprint, as a result says them."""
    return ModelRef(checkpoint.name, checkpoint.fingerprint)


def describe(checkpoint: OpenedModel) -> dict[str, Any]:
    """Identity and size of a model."""
    return identity(checkpoint) | {
        "shape": dict(checkpoint.shape),
        "parameters": checkpoint.parameters,
        "bytes": checkpoint.bytes,
    }


def versions() -> dict[str, str]:
    """Versions that can change a figure."""
    names = ("torch", "transformers", "tokenizers", "safetensors")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a model directory, or None where there is none."""
    file = directory / MANIFEST
    return read_json(file) if file.is_file() else None
