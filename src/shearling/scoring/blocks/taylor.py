"""First-order estimate of the loss that a block's removal costs.

Shortened LLaMA, arXiv 2402.02834, section 3.1: the sum over a block's weights of |W * dL/dW|,
the product summed over the calibration set before its absolute value is taken.

The gradients are computed block by block, so that a model larger than memory can be scored: a
walk forward keeps the state that enters each block, a walk backward runs each block once more
with the gradient that its successor sent. Each block's weights are read twice; the figures are
those of an ordinary backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shearling.engine.stream import BlockStream
from shearling.engine.walk import backward
from shearling.files.progress import Progress, silent
from shearling.scoring.blocks.magnitude import weight_names
from shearling.scoring.registry import criterion
from shearling.scoring.scores import Scores


@criterion(
    "taylor", of="blocks", reads=("text",), windows=(10, 128), backward=True, plus=True, order=30,
    says="first-order estimate of the loss that the block's removal costs: sum of "
    "abs(weight x gradient)",
    work="Shortened LLaMA", paper="2402.02834",
)  # fmt: skip
def taylor(
    stream: BlockStream, ids_NS: Tensor, *, protected: tuple[int, ...], progress: Progress = silent
) -> Scores:
    """Sum over each block's matrices and norm weights of |W * dL/dW|, L the mean NLL."""
    values = [0.0] * stream.depth
    stage = "scoring by Taylor expansion"
    with stream.place.running():
        for step in backward(stream, ids_NS, stage, weights=True, tell=progress):
            step.finish()
            values[step.index] = _product(stream, step.block, step.index)
    return Scores("taylor", "layers", (tuple(values),), protected)


def _product(stream: BlockStream, block: nn.Module, index: int) -> float:
    homes, weights = stream.checkpoint.block_homes(index), dict(block.named_parameters())
    total = 0.0
    names = weight_names(stream.checkpoint, index)
    for parameter in dict.fromkeys(homes[name].parameter for name in names):
        weight = weights[parameter]
        assert weight.grad is not None, parameter
        total += float((weight.detach() * weight.grad).abs().sum(dtype=torch.float64))
    return total
