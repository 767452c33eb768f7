"""Tensors that llama.cpp's files hold in parts, or in another order, family by family.

Said again here, apart from the converter whose files are held against it. Each function gives what
a file has of a tensor, under names that the converter maps to its own, or None for a tensor that
is as all families have it.

Legend: X experts, F neurons of an expert, D hidden, H heads, L latent, K key heads, V value heads
that read one key head, E width of a head, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]


def score_bias(config: Any, name: str, tensor: Tensor) -> Parts | None:
    """The bias with which a router chooses, as a bias of something."""
    ending = "_correction_bias"
    if not name.endswith(ending):
        return None
    return {name.removesuffix(ending) + "_correction.bias": tensor.flatten()}


def interleaved_experts(config: Any, name: str, tensor: Tensor) -> Parts | None:
    """gpt-oss: gates and what they gate lie in turns, and inputs before outputs."""
    if name.endswith(".sinks"):
        return {f"{name}.weight": tensor}
    if name.endswith("_bias"):
        stem, kind = name.removesuffix("_bias"), "bias"
    elif ".experts." in name:
        stem, kind, tensor = name, "weight", tensor.transpose(1, 2)
    else:
        return None
    if not stem.endswith("gate_up_proj"):
        return {f"{stem}.{kind}": tensor}
    base = stem.removesuffix("gate_up_proj")
    return {f"{base}gate_proj.{kind}": tensor[:, ::2], f"{base}up_proj.{kind}": tensor[:, 1::2]}


def halved_inputs(config: Any, name: str, tensor: Tensor) -> Parts | None:
    """Granite: gates above what they gate, of experts and of a shared MLP alike."""
    block, _, module = name.partition(".block_sparse_moe.")
    if not module:
        block, _, module = name.partition(".shared_mlp.")
    if module == "input_linear.weight":
        gate, up = tensor.chunk(2, -2)
        of = "mlp.experts" if tensor.ndim == 3 else "mlp"
        return {f"{block}.{of}.gate_proj.weight": gate, f"{block}.{of}.up_proj.weight": up}
    if ".shared_mlp." in name:
        return {f"{block}.mlp.down_proj.weight": tensor}
    return None


def split_latent(config: Any, name: str, tensor: Tensor) -> Parts | None:
    """DeepSeek: keys and values of a latent apart, head by head, keys turned over."""
    ending = "kv_b_proj.weight"
    if not name.endswith(ending):
        return score_bias(config, name, tensor)
    heads = tensor.unflatten(0, (config.num_attention_heads, -1))
    k_HEL, v_HEL = heads.split([config.qk_nope_head_dim, config.v_head_dim], 1)
    stem = name.removesuffix(ending)
    return {f"{stem}k_b_proj.weight": k_HEL.transpose(1, 2), f"{stem}v_b_proj.weight": v_HEL}


def delta_joined(config: Any, name: str, tensor: Tensor) -> Parts | None:
    """Qwen 3 Next: queries, keys, values and gates of linear attention apart, each of all heads."""
    ending = "in_proj_qkvz.weight"
    if not name.endswith(ending):
        return _delta(name, tensor)
    keys, key = config.linear_num_key_heads, config.linear_key_head_dim
    value = config.linear_num_value_heads // keys * config.linear_value_head_dim
    q, k, v, z = (
        part.flatten(0, 1) for part in tensor.unflatten(0, (keys, -1)).split(
            [key, key, value, value], 1)
    )  # fmt: skip
    stem = name.removesuffix(ending)
    return {f"{stem}in_proj_qkv.weight": torch.cat([q, k, v]), f"{stem}in_proj_z.weight": z}


def delta_apart(config: Any, name: str, tensor: Tensor) -> Parts | None:
    """Qwen 3.5: value heads in turns over key heads, the first of each before the second."""
    keys = config.linear_num_key_heads
    if ".linear_attn." in name and not name.endswith("norm.weight"):
        rows = torch.arange(config.linear_num_value_heads).reshape(keys, -1).T.flatten()
        across = len(tensor) // len(rows) if name.endswith(("A_log", "dt_bias")) else 0
        tensor = _tiled(config, name, tensor, rows, across)
    return _delta(name, tensor)


def _tiled(config: Any, name: str, tensor: Tensor, heads: Tensor, across: int) -> Tensor:
    """A tensor of linear attention with its value heads in the order of ``heads``."""
    width = config.linear_value_head_dim
    if across or name.endswith(("in_proj_a.weight", "in_proj_b.weight")):
        return tensor[heads]
    order = (heads[:, None] * width + torch.arange(width)).flatten()
    if name.endswith("out_proj.weight"):
        return tensor[:, order]
    before = len(tensor) - len(order)  # queries and keys, which stay
    return torch.cat([tensor[:before], tensor[before:][order]])


def _delta(name: str, tensor: Tensor) -> Parts | None:
    """What both have: decay as a factor, no dimension for a channel's one input, norms as such."""
    if name.endswith(".A_log"):
        return {name: -tensor.float().exp()}
    if name.endswith(".dt_bias"):
        return {name.removesuffix("dt_bias") + "dt_proj.bias": tensor}
    if ".conv1d." in name:
        return {name: tensor.squeeze(1)}
    if ".linear_attn." in name:
        return {name: tensor}
    return None
