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
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from shearling.criteria.magnitude import weight_names
from shearling.products import fast_products
from shearling.progress import Progress, silent
from shearling.scores import Scores
from shearling.stream import LOGITS_BYTES, BlockStream, Call
from shearling.wavefront import States


@fast_products()
def taylor(
    stream: BlockStream, ids_NS: Tensor, *, protected: tuple[int, ...], progress: Progress = silent
) -> Scores:
    """Sum over each block's matrices and norm weights of |W * dL/dW|, L the mean NLL."""
    values = [0.0] * stream.depth
    stage = "scoring by Taylor expansion"
    for index, block, passes in backward_walk(stream, ids_NS, stage, weights=True, tell=progress):
        for _ in passes:
            pass
        values[index] = _product(stream, block, index)
    return Scores("taylor", "layers", tuple(values), protected)


def backward_walk(
    stream: BlockStream,
    ids_NS: Tensor,
    stage: str,
    *,
    weights: bool,
    tell: Progress = silent,
    forward: Callable[[int, Tensor], None] = lambda index, h_BSD: None,
) -> Iterator[tuple[int, nn.Module, Iterator[Tensor]]]:
    """Walk forward through the blocks, then backward, handing out each block with its passes.

    Args:
        stream: the model.
        ids_NS: calibration tokens; the loss L is the mean NLL of the predicted ones.
        stage: what to call this in the progress.
        weights: whether gradients at the weights are wanted, summed over the passes.
        tell: told the block runs done.
        forward: told each state (B, S, D) on the way forward, and the block that it leaves.

    Yields:
        A block's number, the block, last one first, and an iterator, to be exhausted, that runs
        a batch through it and back at every step and gives the state after the block.
    """
    total = 2 * stream.depth
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
                        forward(index, h_BSD)
                        states.put(_after(index + 1), number, h_BSD)
                tell(stage, index + 1, total)
        predicted = ids_NS.shape[0] * (ids_NS.shape[1] - 1)
        gradients = [
            _head_gradient(stream, states.get(_after(stream.depth), number), ids_BS, predicted)
            for number, ids_BS in enumerate(batches)
        ]
        for index in reversed(range(stream.depth)):
            with stream.block(index) as block:
                block.requires_grad_(weights)
                try:
                    yield index, block, _passes(block, index, calls, states, gradients)
                finally:
                    block.requires_grad_(False)
                    block.zero_grad(set_to_none=True)
            tell(stage, total - index, total)


def _passes(
    block: nn.Module,
    index: int,
    calls: list[list[Call]],
    states: States,
    gradients: list[Tensor],
) -> Iterator[Tensor]:
    """Run each batch forward and back; ``gradients`` moves from after the block to before it."""
    for number, call in enumerate(calls):
        h_BSD = states.get(_after(index), number).detach().requires_grad_(True)
        with torch.enable_grad():  # whatever the caller has switched off
            after_BSD = call[index](block, h_BSD)
            after_BSD.backward(gradients[number])
        assert h_BSD.grad is not None
        gradients[number] = h_BSD.grad
        yield after_BSD.detach()


def _after(blocks: int) -> frozenset[int]:
    return frozenset({blocks})


def _head_gradient(stream: BlockStream, h_BSD: Tensor, ids_BS: Tensor, predicted: int) -> Tensor:
    """dL/dh of the state that leaves the last block.

    As in ``BlockStream.nll`` the logits of one slice are alive at a time, here with their graph.
    """
    rows = max(1, LOGITS_BYTES // (4 * ids_BS.shape[1] * stream.checkpoint.shape["vocab"]))
    gradients = []
    for h, ids in zip(h_BSD.split(rows), ids_BS.split(rows), strict=True):
        leaf = h.detach().requires_grad_(True)
        with torch.enable_grad():
            (stream.nll(leaf, ids).sum() / predicted).backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    return torch.cat(gradients)


def _product(stream: BlockStream, block: nn.Module, index: int) -> float:
    inner = stream.checkpoint.block_names(index)
    weights = dict(block.named_parameters())
    total = 0.0
    for name in weight_names(stream.checkpoint.layout.block_rows(), index):
        weight = weights[inner[name]]
        assert weight.grad is not None, name
        total += float((weight.detach() * weight.grad).abs().sum(dtype=torch.float64))
    return total
