"""First-order estimate of the loss that a block's removal costs.

Shortened LLaMA, arXiv 2402.02834, section 3.1: the sum over a block's weights of |W * dL/dW|,
the product summed over the calibration set before its absolute value is taken.

The gradients are computed block by block, so that a model larger than memory can be scored: a
walk forward keeps the state that enters each block, a walk backward runs each block once more
with the gradient that its successor sent. Each block's weights are read twice; the figures are
those of an ordinary backward pass.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from shearling.criteria.magnitude import weight_names
from shearling.products import fast_products
from shearling.progress import Progress, silent
from shearling.scores import Scores
from shearling.stream import BlockStream, Call
from shearling.wavefront import States


@fast_products()
def taylor(
    stream: BlockStream, ids_NS: Tensor, *, protected: tuple[int, ...], progress: Progress = silent
) -> Scores:
    """Sum over each block's matrices and norm weights of |W * dL/dW|, L the mean NLL."""
    stage, total = "scoring by Taylor expansion", 2 * stream.depth
    batches = stream.batches(ids_NS)
    with tempfile.TemporaryDirectory(prefix="shearling-") as scratch:
        # Keyed by how many blocks the state has passed, the same store serves both walks.
        states = States(None if stream.resident else Path(scratch))
        calls: list[list[Call]] = []
        with torch.no_grad():
            for number, ids_BS in enumerate(batches):
                h_BSD, call = stream.begin(ids_BS)
                states.put(_after(0), number, h_BSD)
                calls.append(call)
            for index in range(stream.depth):
                with stream.block(index) as block:
                    for number, call in enumerate(calls):
                        h_BSD = call[index](block, states.get(_after(index), number))
                        states.put(_after(index + 1), number, h_BSD)
                progress(stage, index + 1, total)
        predicted = ids_NS.shape[0] * (ids_NS.shape[1] - 1)
        gradients = [
            _head_gradient(stream, states.get(_after(stream.depth), number), ids_BS, predicted)
            for number, ids_BS in enumerate(batches)
        ]
        values = [0.0] * stream.depth
        for index in reversed(range(stream.depth)):
            with stream.block(index) as block:
                block.requires_grad_(True)
                for number, call in enumerate(calls):
                    h_BSD = states.get(_after(index), number).detach().requires_grad_(True)
                    call[index](block, h_BSD).backward(gradients[number])
                    assert h_BSD.grad is not None
                    gradients[number] = h_BSD.grad
                values[index] = _product(stream, block, index)
                block.requires_grad_(False)
                block.zero_grad(set_to_none=True)
            progress(stage, total - index, total)
    return Scores("taylor", "layers", tuple(values), protected)


def _after(blocks: int) -> frozenset[int]:
    return frozenset({blocks})


def _head_gradient(stream: BlockStream, h_BSD: Tensor, ids_BS: Tensor, predicted: int) -> Tensor:
    """dL/dh of the state that leaves the last block."""
    h_BSD = h_BSD.detach().requires_grad_(True)
    with torch.enable_grad():
        (stream.nll(h_BSD, ids_BS).sum() / predicted).backward()
    assert h_BSD.grad is not None
    return h_BSD.grad


def _product(stream: BlockStream, block: nn.Module, index: int) -> float:
    inner = stream.checkpoint.block_names(index)
    weights = dict(block.named_parameters())
    total = 0.0
    for name in weight_names(stream.checkpoint.layout.block_rows(), index):
        weight = weights[inner[name]]
        assert weight.grad is not None, name
        total += float((weight.detach() * weight.grad).abs().sum(dtype=torch.float64))
    return total
