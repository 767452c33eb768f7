"""What a model takes in memory, and what is free: estimated before anything is loaded."""

from __future__ import annotations

import math
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError, safe_open

from shearling.errors import ShearlingError
from shearling.model.dtypes import STORED, dtype_of, name_of
from shearling.model.weight_files import weight_files

# Bytes of the types that keep their size whatever is computed in; those not named take one.
_BYTES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}


def free_bytes(device: str = "cpu") -> int | None:
    """Free memory of a CPU or a CUDA device, in bytes; None where we cannot tell."""
    if device == "cpu":
        return psutil.virtual_memory().available
    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.mem_get_info(torch.device(device))[0]
    return None


def loaded_bytes(path: Path, dtype: torch.dtype | None = None) -> int:
    """Bytes of a directory's weights in memory, from the headers of its safetensors alone.

    Args:
        path: the directory.
        dtype: what floating-point weights become; None leaves them as they are stored.

    Raises:
        ShearlingError: a file is truncated or corrupt.
    """
    total = 0
    for file in weight_files(path):
        try:
            with safe_open(file, "pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - a handle is not a mapping
                    view = shard.get_slice(name)
                    total += _itemsize(view.get_dtype(), dtype) * math.prod(view.get_shape())
        except SafetensorError as error:
            reason = " ".join(str(error).split())
            raise ShearlingError(f"The model in {path} cannot be loaded: {reason}") from error
    return total


def _itemsize(stored: str, dtype: torch.dtype | None) -> int:
    if stored in STORED:
        return (dtype or STORED[stored]).itemsize
    return _BYTES.get(stored, 1)


def check_fits(
    path: Path, dtype: str | torch.dtype, *, extra_bytes: int = 0, device: str = "cpu"
) -> None:
    """Refuse a model that does not fit in the memory that is free, before it is loaded.

    Args:
        path: the model's directory.
        dtype: what its floating-point weights will be in; quantised ones keep their size.
        extra_bytes: what is needed besides: caches, states, another model.
        device: where it goes, such as cpu or cuda:0; memory of other kinds is not checked.

    Raises:
        ShearlingError: it needs more than there is, with both figures.
    """
    kind = dtype_of(dtype) if isinstance(dtype, str) else dtype
    needed = loaded_bytes(path, kind) + extra_bytes
    free = free_bytes(device)
    if free is None or needed <= free:
        return
    half = loaded_bytes(path, torch.bfloat16) + extra_bytes
    smaller = f"use bfloat16 ({half / 1e9:.1f} GB), " if half < free else ""
    raise ShearlingError(
        f"The model in {path} needs about {needed / 1e9:.1f} GB in {name_of(kind)}, but "
        f"{free / 1e9:.1f} GB of memory on {device} are free; {smaller}free some, or give a "
        "smaller model."
    )
