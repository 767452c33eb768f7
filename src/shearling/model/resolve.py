"""From what a user calls a model to a directory: local, hub id, or GGUF converted once."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError
from shearling.files.quiet import no_progress_bars
from shearling.files.staging import reserved
from shearling.files.writer import file_digest, new_directory
from shearling.model import adapters
from shearling.model.side_files import HUB, HUB_NEVER

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LOCAL = {"trust_remote_code": False, "local_files_only": True}


def cache_directory() -> Path:
    """Where converted models are kept: ``$SHEARLING_CACHE``, or the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SHEARLING_CACHE") or Path(base) / "shearling")


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
    path = Path(model)
    if path.is_dir():
        return path
    if path.is_file() and path.suffix == ".gguf":
        return _converted(path)
    if path.is_file():
        raise ShearlingError(
            f"{model} is a file; give the directory it lies in, a .gguf file or a hub id."
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
    """The directory a GGUF file was converted into, made on the first call.

    transformers dequantises and maps the names back; reading a tokenizer out of a GGUF file
    takes half a minute, which is why the result is kept.
    """
    target = cache_directory() / "gguf" / file_digest(gguf)[:16] / gguf.stem
    if target.is_dir():
        return target
    with reserved(target.resolve(), wait=True):  # somebody else may be at it
        return target if target.is_dir() else _convert(gguf, target)


def _convert(gguf: Path, target: Path) -> Path:
    """Have transformers read a GGUF file, and keep what it read."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        with no_progress_bars():
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                **_LOCAL,
            )
            tokenizer: Any = AutoTokenizer.from_pretrained(
                gguf.parent, gguf_file=gguf.name, **_LOCAL
            )
    except Exception as error:  # whatever the readers raise, struct.error among it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        lacking = isinstance(error, ImportError) or "pip install" in reason
        remedy = "install shearling[gguf]" if lacking else "give the model's safetensors instead"
        raise ShearlingError(
            f"{gguf} cannot be converted by transformers ({reason}); {remedy}."
        ) from error
    with new_directory(target) as staging, no_progress_bars():
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    return target
