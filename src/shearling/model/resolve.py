"""From what a user calls a model to a directory: local, hub id, or GGUF converted once."""

from __future__ import annotations

import re
from pathlib import Path

from shearling.errors import ShearlingError
from shearling.files.cache import cache_directory
from shearling.files.staging import reserved
from shearling.files.writer import file_digest, new_directory
from shearling.model import adapters
from shearling.model.side_files import HUB, HUB_NEVER

# How files end that lie in a model's directory.
OF_A_MODEL = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", "config.json")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(model: str | Path, *, merge_adapter: bool = False) -> Path:
    """The directory that holds ``model``.

    Args:
        model: a directory, a ``.gguf`` file or a hub id.
        merge_adapter: whether an adapter in the directory is merged (once, into the cache).

    Raises:
        ShearlingError: no such directory or file, the hub has no such model, or the directory
            holds an adapter that is not to be merged, or cannot be.
    """
    path = locate(model)
    if merge_adapter and adapters.has_adapter(path):
        return adapters.merged(path)
    adapters.check_no_adapter(path)
    return path


def locate(model: str | Path) -> Path:
    """The same, whether or not an adapter lies in the directory."""
    if model == "":
        raise ShearlingError(
            "An empty name was given for a model, but a model directory, a .gguf file or a hub id "
            "was expected."
        )
    path = Path(model)
    if path.is_dir():
        return path
    if path.is_file() and path.suffix == ".gguf":
        return _converted(path)
    if path.is_file() and path.name.endswith(OF_A_MODEL):
        raise ShearlingError(
            f"{model} is a file; give the directory it lies in, a .gguf file or a hub id."
        )
    if path.is_file():
        raise ShearlingError(
            f"{model} is a file that is no model; a model directory, a .gguf file or a hub id was "
            "expected."
        )
    if not path.is_absolute() and HUB_ID.fullmatch(str(model)):
        return _download(str(model))
    raise ShearlingError(
        f"{model} is neither a directory, a .gguf file nor a hub id such as "
        "HuggingFaceTB/SmolLM2-135M."
    )


def _download(hub_id: str) -> Path:
    """A snapshot of a hub model; pickled weights and consolidated copies are not even fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=[*HUB], ignore_patterns=[*HUB_NEVER]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ShearlingError(
            f"{hub_id} is no local directory and could not be fetched from the hub "
            f"({type(error).__name__}); check the name, the network and your access, "
            "or give a local directory."
        ) from error


def _converted(gguf: Path) -> Path:
    """The directory a GGUF file was converted into, made on the first call."""
    target = cache_directory() / "gguf" / file_digest(gguf)[:16] / gguf.stem
    if target.is_dir():
        return target
    with reserved(target.resolve(), wait=True):  # somebody else may be at it
        return target if target.is_dir() else _convert(gguf, target)


def _convert(gguf: Path, target: Path) -> Path:
    """Convert a GGUF file, and keep what came of it."""
    from shearling.files.terminal import progress_bars
    from shearling.model.gguf import GgufFile, convert_by_transformers, convert_gguf, known

    file = GgufFile.open(gguf)
    with new_directory(target) as staging:
        if known(file):
            with progress_bars() as progress:
                convert_gguf(file, staging, progress)
        else:
            convert_by_transformers(file, staging)
    return target
