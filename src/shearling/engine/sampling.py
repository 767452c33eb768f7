"""A resident model writes: sequences drawn from its own distribution, as many at once as fit.

Shapes: B sequences of S tokens in the end, of which T are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from shearling.engine.decoding import continue_sequences
from shearling.engine.place import Place
from shearling.engine.stream import BlockStream
from shearling.engine.words import Words
from shearling.model.checkpoint import Checkpoint
from shearling.table.cost import kv_cache_bytes, state_bytes

PREFIX = 4  # tokens of a real text to begin with: enough for a subject, too few to bind the rest
CACHE_BYTES = 2 * 2**30  # of keys and values alive at once; half of what a GPU has to spare


class Writer(Protocol):
    """What writes a batch; see :func:`writing`."""

    def __call__(
        self,
        ids_BS: Tensor,
        at_BT: Tensor,
        tell: Callable[[int], None],
        given_BT: Tensor | None = None,
        /,
    ) -> Tensor:
        """Tokens (B, S) whose last T are drawn by ``at_BT``; ``tell`` hears how many are.

        Those that ``given_BT`` marks are there already and stay.
        """
        ...


@contextmanager
def writing(stream: BlockStream, words: Words | None = None) -> Generator[Writer]:
    """Have a model write, one batch after another.

    The model is resident, and on a processor its weights are there a second time in the order
    that fast products want. Every token is drawn from the model's whole distribution at
    temperature 1; an end of text does not end a sequence, as in packed text.

    Args:
        stream: the model.
        words: those that stand for a large vocabulary (:mod:`shearling.engine.words`), if any.
    """
    device, recorded = stream.place.device, not stream.checkpoint.layout.routed
    # Not in inference mode, in which weights could not be packed.
    with (
        torch.no_grad(), stream.place.running(packed=None), stream.abridged(words),
        stream.whole() as model,
    ):  # fmt: skip

        def write_batch(
            ids_BS: Tensor,
            at_BT: Tensor,
            tell: Callable[[int], None],
            given_BT: Tensor | None = None,
        ) -> Tensor:
            ids_BS, at_BT = ids_BS.to(device), at_BT.to(device)
            given_BT = None if given_BT is None else given_BT.to(device)
            for step in continue_sequences(
                model, ids_BS, at_BT, words, recorded=recorded, given_BT=given_BT
            ):
                tell(step)
            return ids_BS.cpu()

        yield write_batch


def sequences_at_once(checkpoint: Checkpoint, place: Place, length: int) -> int:
    """How many sequences of so many tokens can be written at once in the memory there is."""
    budget = max(CACHE_BYTES, place.spare // 2)
    return max(1, budget // (_cached_values(checkpoint, length) * place.dtype.itemsize))


def _cached_values(checkpoint: Checkpoint, length: int) -> int:
    """Keys and values of a sequence, and the states of linear attention."""
    layout, shape = checkpoint.layout, checkpoint.shape
    keys = kv_cache_bytes(layout, shape, 1, itemsize=1)
    if "latent" in shape:  # is cached unfolded
        keys = 2 * layout.blocks_with("heads", shape) * shape["heads"] * shape["head_dim"]
    return keys * length + state_bytes(layout, shape, 1)
