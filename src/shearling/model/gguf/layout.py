"""Where a family's tensors lie in a GGUF file, and how their rows and values differ there.

Both ways: what a file holds becomes a checkpoint's, and a checkpoint's what a file must hold.

Legend: H heads, E half of a head's width, D a head's width, O outputs, I inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shearling.model.gguf.header import gguf_package
from shearling.table.axes import Row
from shearling.table.families import Family
from shearling.table.values import Shape

ENDINGS = (".weight", ".bias")


def file_names(names: list[str], architecture: str, depth: int) -> dict[str, str | None] | None:
    """Name in a checkpoint -> name in a file, None where it has none.

    None for an architecture that the gguf package lacks.
    """
    gguf = gguf_package()
    kinds: dict[str, Any] = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in kinds:
        return None
    table = gguf.get_tensor_name_map(kinds[architecture], depth)
    return {name: table.get_name(name, try_suffixes=ENDINGS) for name in names}


def parts(
    family: Family, config: Any, shape: Shape, name: str, row: Row, tensor: Tensor
) -> dict[str, Tensor]:
    """What a file holds of a checkpoint's tensor: names that converters know -> values.

    Most families' files hold one tensor for one, under its own name.
    """
    facts = family.llama_cpp
    apart = facts.stored(config, name, tensor) if facts is not None and facts.stored else None
    if apart is None:
        return {name: to_file(family, shape, name, row, tensor)}
    return {part: values.float() for part, values in apart.items()}


def to_file(family: Family, shape: Shape, name: str, row: Row, tensor: Tensor) -> Tensor:
    """A checkpoint's tensor with its rows in llama.cpp's order, norms as it multiplies by them."""
    tensor = tensor if tensor.dtype == torch.float16 else tensor.float()
    if row.role == "norm" and family.gain_offset:
        return (tensor + family.gain_offset).float()
    module, heads = _module(name), 0
    if family.llama_cpp is not None and module in family.llama_cpp.paired:
        # rotary pairs lie side by side, not half apart
        heads = shape[family.llama_cpp.paired[module]]
        t_H2EO = tensor.unflatten(0, (heads, 2, shape["head_dim"] // 2))
        return t_H2EO.transpose(1, 2).flatten(0, 2).float()
    if family.llama_cpp is not None and module in family.llama_cpp.fused:
        t_H3DO = tensor.unflatten(0, (shape["heads"], 3, shape["head_dim"]))
        return t_H3DO.transpose(0, 1).flatten(0, 2).float()
    return tensor.float()


def from_file(family: Family, shape: Shape, name: str, row: Row, tensor: Tensor) -> Tensor:
    """What :func:`to_file` was given, in float32."""
    tensor = tensor.float()
    if row.role == "norm" and family.gain_offset:
        return tensor - family.gain_offset
    module = _module(name)
    assert family.llama_cpp is not None, "such a family is not read"
    if module in family.llama_cpp.paired:
        heads = shape[family.llama_cpp.paired[module]]
        t_HE2O = tensor.unflatten(0, (heads, shape["head_dim"] // 2, 2))
        return t_HE2O.transpose(1, 2).flatten(0, 2)
    if module in family.llama_cpp.fused:
        t_3HDO = tensor.unflatten(0, (3, shape["heads"], shape["head_dim"]))
        return t_3HDO.transpose(0, 1).flatten(0, 2)
    return tensor


def _module(name: str) -> str:
    """The module that holds a tensor: the last part of its name but one."""
    return name.split(".")[-2]
