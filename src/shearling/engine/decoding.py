"""Token by token: a resident model continues many sequences at once, keys and values in place.

A token of a small model is a thousand small products, and starting them takes longer than they do.
On a GPU one step is therefore recorded once and replayed for every token.

Shapes: B sequences of S tokens in the end, of which T are drawn; V vocabulary, H heads,
D of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from shearling.engine.words import Words

WARM_UP = 2  # steps before one is recorded: libraries allocate on first use
SEGMENT = 64  # positions that a recorded step sees more than the one before it


def draw(sums_TV: Tensor, at_T1: Tensor) -> Tensor:
    """Tokens (T, 1) drawn from distributions.

    Args:
        sums_TV: running sums of the probabilities, which need not end at 1.
        at_T1: uniform draws between 0 and 1.
    """
    drawn_T1 = torch.searchsorted(sums_TV, at_T1 * sums_TV[:, -1:], right=True)
    return drawn_T1.clamp_(max=sums_TV.shape[1] - 1)  # rounding may have drawn the very end


def continue_sequences(
    model: Any, ids_BS: Tensor, at_BT: Tensor, words: Words | None = None, *,
    given_BT: Tensor | None = None, recorded: bool = True,
) -> Iterator[int]:  # fmt: skip
    """Fill the last T tokens of each row by its draws; tells how many are filled.

    Args:
        model: a stock model, weights on the device of the tokens.
        ids_BS: tokens (B, S), the first S - T of them given; filled in place.
        at_BT: a uniform draw between 0 and 1 for every token.
        words: those that the model's logits are of, if not all.
        given_BT: which of those last tokens are given as well, and not drawn; none, if not given.
        recorded: whether a GPU may replay a step; not where the host decides what is computed, as
            it does with experts.
    """
    start, steps = ids_BS.shape[1] - at_BT.shape[1], at_BT.shape[1]
    recorded = recorded and ids_BS.device.type == "cuda"
    fixed = _fixed_rooms(model, ids_BS.shape[1]) if recorded else None
    if fixed is None or steps <= WARM_UP:
        cache = _growing(model, ids_BS.shape[1])
        yield from _stepwise(model, ids_BS, at_BT, cache, words, given_BT)
        return
    cache = Cache(layers=list(fixed))
    first = None if given_BT is None else given_BT[:, :WARM_UP]
    ids_BF = ids_BS[:, : start + WARM_UP]
    yield from _stepwise(model, ids_BF, at_BT[:, :WARM_UP], cache, words, first)
    step = _Step(model, ids_BS, at_BT, cache, WARM_UP, words, given_BT)
    yield from _in_segments(step, fixed, recorded=True)


def _in_segments(step: _Step, fixed: list[_Fixed], *, recorded: bool) -> Iterator[int]:
    """Run a step until all is filled, by the number of positions that it has to see.

    A recording holds for one number; seeing all of them from the first on would be twice the work.
    """
    done, steps = step.done, step.at_BT.shape[1]
    while done < steps:
        seen = min(step.start + done + SEGMENT - 1, step.start + steps - 1)
        for room in fixed:
            room.seen = seen
        run = _record(step) if recorded else step
        for number in range(done + 1, seen - step.start + 2):
            run()
            yield number
        done = seen - step.start + 1


def _stepwise(
    model: Any, ids_BS: Tensor, at_BT: Tensor, cache: Cache, words: Words | None = None,
    given_BT: Tensor | None = None,
) -> Iterator[int]:  # fmt: skip
    """Step by step, as Python says."""
    start = ids_BS.shape[1] - at_BT.shape[1]
    feed_BS = ids_BS[:, :start]
    for step, at_B in enumerate(at_BT.unbind(1)):
        feed_BS = _next(model, feed_BS, cache, at_B[:, None], words)
        if given_BT is not None:
            given_B1 = given_BT[:, step : step + 1]
            feed_BS = torch.where(given_B1, ids_BS[:, start + step, None], feed_BS)
        ids_BS[:, start + step] = feed_BS[:, 0]
        yield step + 1


def _next(model: Any, feed_BS: Tensor, cache: Cache, at_B1: Tensor, words: Words | None) -> Tensor:
    """The tokens (B, 1) drawn behind those fed."""
    out = model(feed_BS, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits_BW = out.logits[:, -1].float()
    if words is not None:
        logits_BW = logits_BW + words.log_counts_W
    drawn_B1 = draw(logits_BW.softmax(-1).cumsum_(-1), at_B1)
    return drawn_B1 if words is None else words.ids_W[drawn_B1]


class _Step:
    """One step that can be recorded: where it is, count tensors on the device.

    Attributes:
        done: tokens drawn when it was made.
        words: those that the model's logits are of, if not all.
        given_BT: which tokens are not drawn.
    """

    def __init__(
        self, model: Any, ids_BS: Tensor, at_BT: Tensor, cache: Cache, done: int,
        words: Words | None = None, given_BT: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Nothing runs yet."""
        self.words, self.given_BT = words, given_BT
        self.model, self.ids_BS, self.at_BT, self.cache = model, ids_BS, at_BT, cache
        self.start, self.done = ids_BS.shape[1] - at_BT.shape[1], done
        self._at_1 = torch.tensor([done], device=ids_BS.device)

    def __call__(self) -> None:
        """Read the newest tokens and write those behind them."""
        position_1 = self._at_1 + self.start
        feed_B1 = self.ids_BS.index_select(1, position_1 - 1)
        at_B1 = self.at_BT.index_select(1, self._at_1)
        drawn_B1 = _next(self.model, feed_B1, self.cache, at_B1, self.words)
        if self.given_BT is not None:
            given_B1 = self.given_BT.index_select(1, self._at_1)
            drawn_B1 = torch.where(given_B1, self.ids_BS.index_select(1, position_1), drawn_B1)
        self.ids_BS.index_copy_(1, position_1, drawn_B1)
        self._at_1 += 1


def _record(step: Callable[[], None]) -> Callable[[], None]:
    """The same as a CUDA graph; recording runs nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class _Fixed(StaticLayer):
    """Keys and values of one block at fixed addresses, of which the first ``seen`` are looked at.

    Where the next ones go says a counter on the device.
    """

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.seen = length

    def update(self, *new: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Put the new ones behind those there are, and return those that are seen."""
        k_BHSD, v_BHSD = super().update(*new, **options)
        return k_BHSD[:, :, : self.seen], v_BHSD[:, :, : self.seen]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many there are to see, and the position of the first."""
        return self.seen, 0


def _fixed_rooms(model: Any, length: int) -> list[_Fixed] | None:
    """Room of fixed size for every block; None where blocks keep something else."""
    kinds = StaticCache(config=model.config, max_cache_len=length).layers
    for kind in kinds:
        # A window that nothing leaves is none; its own layer counts in Python.
        whole = type(kind) is StaticSlidingWindowLayer and kind.max_cache_len >= length
        if not whole and type(kind) is not StaticLayer:
            return None
    return [_Fixed(length) for _ in kinds]


def _growing(model: Any, length: int) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.layers = [_Room(length) if _grows(x, length) else x for x in cache.layers]
    return cache


def _grows(layer: Any, length: int) -> bool:
    """Whether a block keeps all of so many tokens: a window that nothing leaves is none."""
    if type(layer) is DynamicSlidingWindowLayer:
        return layer.sliding_window >= length
    return type(layer) is DynamicLayer


class _Room(DynamicLayer):
    """Keys and values of one block, with room for all there will be.

    transformers' own layer copies everything at every token, more than half the time of a step.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def update(self, k_BHSD: Tensor, v_BHSD: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Put the new ones behind those there are, and return all."""
        if not self.is_initialized:
            self.lazy_initialization(k_BHSD, v_BHSD)
            self.room = [
                new.new_empty(*new.shape[:2], self.length, new.shape[3]) for new in (k_BHSD, v_BHSD)
            ]
        start = self.get_seq_length()
        end = start + k_BHSD.shape[2]
        for room, new in zip(self.room, (k_BHSD, v_BHSD), strict=True):
            room[:, :, start:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values
