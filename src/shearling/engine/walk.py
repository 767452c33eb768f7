"""Final states of many batches, with each block's weights read as seldom as space allows.

Shapes: B sequences, S positions, D hidden.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from shearling.engine.states import Key, States
from shearling.engine.stream import LOGITS_BYTES, BlockStream, Call
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent

SCRATCH_BYTES = 8 * 2**30  # of states on disk at a time, where the model is streamed


def last_states(
    stream: BlockStream, batches: Sequence[Tensor], tell: Callable[[int], None]
) -> Iterator[Tensor]:
    """The state (B, S, D) that leaves the last block, of each batch of ids (B, S), in order.

    In memory a batch goes all the way by itself. Where the model is streamed, SCRATCH_BYTES of
    states lie on disk at a time, and blocks are read once for as many.

    Args:
        stream: the model.
        batches: tokens.
        tell: called with a batch's number whenever it has left a block.
    """
    none: frozenset[int] = frozenset()
    width = stream.checkpoint.shape["hidden"] * stream.dtype.itemsize
    most = max(1, SCRATCH_BYTES // (max(ids.numel() for ids in batches) * width))
    each = 1 if stream.resident else most
    for first in range(0, len(batches), each):
        group = range(first, min(first + each, len(batches)))
        with tempfile.TemporaryDirectory(prefix="shearling-") as scratch:
            states = States(None if stream.resident else Path(scratch))
            calls = {}
            for number in group:
                h_BSD, calls[number] = stream.begin(batches[number])
                states.put(none, number, h_BSD)
            for index in range(stream.depth):
                with stream.block(index) as block:
                    for number in group:
                        h_BSD = calls[number][index](block, states.get(none, number))
                        states.put(none, number, h_BSD)
                        tell(number)
            for number in group:
                yield states.get(none, number)


_STATE: Key = frozenset()
# A block's number, the block, and an iterator that runs a batch at every step and gives the state
# after the block.
Walk = Iterator[tuple[int, nn.Module, Iterator[Tensor]]]


def forward_walk(stream: BlockStream, ids_NS: Tensor, stage: str, tell: Progress) -> Walk:
    """Hand out the blocks in order, each with an iterator of its passes, to be exhausted."""
    with tempfile.TemporaryDirectory(prefix="shearling-") as scratch:
        states = States(None if stream.resident else Path(scratch))
        calls = []
        for number, ids_BS in enumerate(stream.batches(ids_NS)):
            with torch.no_grad():
                h_BSD, call = stream.begin(ids_BS)
            states.put(_STATE, number, h_BSD)
            calls.append(call)

        def passes(index: int, block: nn.Module) -> Iterator[Tensor]:
            for number, call in enumerate(calls):
                with torch.no_grad():
                    h_BSD = call[index](block, states.get(_STATE, number))
                states.put(_STATE, number, h_BSD)
                yield h_BSD

        for index in range(stream.depth):
            with stream.block(index) as block:
                yield index, block, passes(index, block)
            tell(stage, index + 1, stream.depth)


def check_state(index: int, h_BSD: Tensor) -> None:
    """Raise ShearlingError unless the state after block ``index`` is finite."""
    if not bool(h_BSD.isfinite().all()):
        raise ShearlingError(
            f"block {index} gives activations that are not finite numbers; its weights, or those "
            "before it, hold NaN or infinity, or overflow: fetch the checkpoint again."
        )


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
