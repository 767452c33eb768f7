"""Final states of many batches, with each block's weights read as seldom as space allows.

Shapes: B sequences, S positions, D hidden.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from shearling.stream import BlockStream
from shearling.wavefront import States

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
