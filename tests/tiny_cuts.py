"""Cuts of tiny models: odd legal shapes, random choices, the tokens to compare them on."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from shearling.model.checkpoint import Checkpoint
from shearling.table.values import Indices, Keep

Models = Callable[[str], Path]
Narrowed = Callable[[str], tuple[Checkpoint, Keep, Checkpoint]]

# What a config can say of hidden size and heads: anything, a multiple, or the very product.
MULTIPLE = ("llama-biases", "gemma2", "gemma3")
PRODUCT = ("gpt_neox", "gpt_neox-serial", "opt", "opt-projected", "opt-bare")
AXES = ("layers", "hidden", "heads", "kv_heads", "mlp", "vocab")


def sizes_of(variant: str, axes: tuple[str, ...]) -> dict[str, int]:
    """An odd legal shape that differs from the source's on ``axes``, and where it must."""
    if variant in PRODUCT:
        sizes = {"layers": 3, "hidden": 28, "heads": 7, "mlp": 13, "vocab": 60}
        coupled = {"hidden", "heads"} if {"hidden", "heads"} & set(axes) else set()
        return {axis: n for axis, n in sizes.items() if axis in {*axes, *coupled}}
    multiple = 28 if len(axes) > 1 else 27
    sizes = {"layers": 3, "hidden": multiple if variant in MULTIPLE else 29, "mlp": 13}
    sizes |= {"vocab": 60, "heads": 4 if len(axes) > 1 else 6, "kv_heads": 2}
    return {axis: n for axis, n in sizes.items() if axis in axes}


def random_keep(checkpoint: Checkpoint, sizes: dict[str, int], seed: int = 0) -> Keep:
    """Units at random, each block's its own; heads equally many in each group."""
    draw, shape = random.Random(f"{seed}"), checkpoint.shape

    def some(count: int, of: list[int]) -> Indices:
        return tuple(sorted(draw.sample(of, count)))

    model = {
        axis: some(sizes[axis], list(range(shape[axis])))
        for axis in ("layers", "hidden")
        if axis in sizes
    }
    if "vocab" in sizes:  # the first three are named in the configuration
        model["vocab"] = (0, 1, 2, *some(sizes["vocab"] - 3, list(range(3, shape["vocab"]))))
    depth = sizes.get("layers", shape["layers"])
    blocks: dict[str, list[Indices]] = {
        axis: [] for axis in ("mlp", "heads", "kv_heads") if axis in sizes
    }
    for _ in range(depth):
        if "mlp" in sizes:
            blocks["mlp"].append(some(sizes["mlp"], list(range(shape["mlp"]))))
        groups = shape.get("kv_heads", 1)
        kept = some(sizes.get("kv_heads", groups), list(range(groups)))
        if "kv_heads" in sizes:
            blocks["kv_heads"].append(kept)
        if "heads" in sizes:
            each, now = shape["heads"] // groups, sizes["heads"] // len(kept)
            heads = (some(now, list(range(g * each, (g + 1) * each))) for g in kept)
            blocks["heads"].append(tuple(h for group in heads for h in group))
    return Keep(model, {axis: tuple(each) for axis, each in blocks.items()})


def prepared(models: Models, variant: str, axes: tuple[str, ...]) -> tuple[Checkpoint, Keep]:
    checkpoint = Checkpoint.open(models(variant))
    axes = tuple(axis for axis in axes if axis in checkpoint.shape)
    return checkpoint, random_keep(checkpoint, sizes_of(variant, axes))


def tokens(keep: Keep, vocab: int) -> tuple[Tensor, Tensor]:
    """The same tokens (2, 17) in the result's and in the source's numbering."""
    kept = torch.tensor(keep.model.get("vocab", tuple(range(vocab))))
    ids_BS = torch.randint(len(kept), (2, 17), generator=torch.Generator().manual_seed(3))
    return ids_BS, kept[ids_BS]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
