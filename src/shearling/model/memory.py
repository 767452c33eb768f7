"""What a model takes in memory, and what is free: estimated before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

from shearling.errors import ShearlingError
from shearling.files.reading import read_json
from shearling.files.sizes import in_bytes
from shearling.model.dtypes import STORED, dtype_of, name_of
from shearling.model.stored import StoredTensor, stored_tensors
from shearling.model.wrapping import disk_names, plain_config, wrapping_of
from shearling.table.families import FAMILIES
from shearling.table.families.wrappers import is_known


def free_bytes(device: str = "cpu") -> int | None:
    """Free memory of a CPU or a CUDA device, in bytes; None where we cannot tell."""
    if device == "cpu":
        return psutil.virtual_memory().available
    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.mem_get_info(torch.device(device))[0]
    return None


def loaded_bytes(path: Path, dtype: torch.dtype | None = None) -> int:
    """Bytes of a directory's weights in memory, from the headers of its safetensors alone.

    Each tensor that is loaded counts once: not files that nothing loads, and neither a tensor that
    is tied to another nor one that the model does not have, should they be stored.

    Args:
        path: the directory.
        dtype: what floating-point weights become; None leaves them as they are stored.

    Raises:
        ShearlingError: a file is truncated or corrupt.
    """
    try:
        stored = stored_tensors(path)
        names = _loaded_names(path, stored)
    except ShearlingError as error:
        raise ShearlingError(f"The model in {path} cannot be loaded: {error}") from error
    return sum(
        tensor.elements * _itemsize(tensor.dtype, tensor.itemsize, dtype)
        for name, tensor in stored.items()
        if names is None or name in names
    )


def _loaded_names(path: Path, stored: Mapping[str, StoredTensor]) -> set[str] | None:
    """Tensors that a model of a known family has, tied ones once; None where we do not know.

    Of a model with a language model inside, the language model's, by their names on disk.
    """
    from shearling.model.loading import load_config

    raw = read_json(path / "config.json")
    wrapping = wrapping_of(path, stored) if is_known(raw) else None
    model_type = (raw if wrapping is None else wrapping.text).get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None or raw.get("quantization_config"):
        return None
    config = load_config(path) if wrapping is None else plain_config(wrapping.text, path)
    layout, shape = family.layout(config), family.shape(config)
    stacked = {name for name, _, _ in family.stacked.values()}  # some files hold experts so
    joined = {name.format(block) for name in stacked for block in range(shape["layers"])}
    return set(disk_names(wrapping, joined | layout.tensors(shape).keys()).values())


def _itemsize(stored: str, itemsize: int, dtype: torch.dtype | None) -> int:
    return itemsize if dtype is None or stored not in STORED else dtype.itemsize


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
    smaller = f"use bfloat16 ({in_bytes(half)}), " if half < free else ""
    raise ShearlingError(
        f"The model in {path} needs about {in_bytes(needed)} in {name_of(kind)}, but "
        f"{in_bytes(free)} of memory on {device} are free; {smaller}free some, or give a "
        "smaller model."
    )
