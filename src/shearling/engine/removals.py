"""Losses of many block-removals in one walk through the model.

Variants of a model that differ only in which blocks they skip share every state up to the first
block on which they disagree. Walking all variants forward together, one state for each distinct
set of blocks skipped so far, reads each block's weights once and computes no state twice: exact,
and for the n single removals of n blocks about half the work of running each. The same walk
serves the perplexity criterion, greedy removal and damage curves.

Shapes: N sequences, split into batches of B; S positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shearling.engine.states import States
from shearling.engine.stream import BlockStream
from shearling.engine.walk import Runs, Text, forward
from shearling.files.progress import Progress, silent

Removed = frozenset[int]
_NONE: Removed = frozenset()


@torch.inference_mode()
def removal_nll(
    stream: BlockStream,
    ids_NS: Tensor,
    removals: Sequence[Removed],
    *,
    progress: Progress = silent,
    stage: str = "running the blocks",
    abridged: bool = False,
) -> list[float]:
    """Mean negative log-likelihood of the model without each of some sets of blocks.

    Ranks share the sequences.

    Args:
        stream: the model.
        ids_NS: calibration tokens.
        removals: sets of block numbers; the empty set is the intact model.
        progress: told the block runs done, of a total known beforehand.
        stage: what to call this in the progress.
        abridged: let some words stand for a large vocabulary (:mod:`shearling.engine.words`):
            those that the variant with most blocks finds likely, and the text's own.

    Returns:
        Nats per predicted token (the first of each sequence is not predicted), by removal.
    """
    wanted = list(dict.fromkeys(removals))
    ranks = stream.place.ranks.of(len(ids_NS))
    batches = stream.batches(ranks.share(ids_NS))
    plan = [_step(wanted, block) for block in range(stream.depth)]
    # The head costs about as much as it has parameters; it is counted in runs of a block.
    total = (sum(len(runs) for runs, _ in plan) + len(wanted)) * len(batches)
    done = 0
    with stream.place.running(), States(stream.place) as states:
        text = Text(stream, states, _NONE).begin(batches)

        def runs(index: int) -> Runs:
            going, skipping = plan[index]
            for key in skipping:
                _skip(states, key, index, len(batches), shared=key in going)
            return [(key, number) for number in range(len(batches)) for key in going]

        for step in forward(text, runs=runs, merged=True):
            for _ in step.passes:
                done += 1
                progress(stage, done, total)
        sums: list[float] = []
        words = None
        if abridged:
            fullest = min(wanted, key=len)
            last = ((states.get(fullest, number), ids) for number, ids in enumerate(batches))
            words = stream.likely_words(last, ids_NS, ranks, tokens=ids_NS.numel())
        with stream.abridged(words):
            for key in wanted:
                nll = []
                for number, ids_BS in enumerate(batches):
                    nll.append(stream.nll(states.get(key, number), ids_BS).double().sum())
                    done += 1
                    progress(stage, done, total)
                sums.append(float(sum(nll)))
    predicted = ids_NS.shape[0] * (ids_NS.shape[1] - 1)
    losses = dict(zip(wanted, (nats / predicted for nats in ranks.totals(sums)), strict=True))
    return [losses[removed] for removed in removals]


def _skip(states: States, key: Removed, block: int, batches: int, *, shared: bool) -> None:
    """Let a variant's states stand behind a block that it skips; others may still need them."""
    for number in range(batches):
        if shared:
            states.put(key | {block}, number, states.get(key, number))
        else:
            states.move(key, key | {block}, number)


def _step(wanted: Sequence[Removed], block: int) -> tuple[list[Removed], list[Removed]]:
    """Keys of the states that run ``block``, and of those from which some variant skips it."""
    runs: dict[Removed, None] = {}
    skips: dict[Removed, None] = {}
    for removed in wanted:
        key = frozenset(b for b in removed if b < block)
        (skips if block in removed else runs)[key] = None
    return list(runs), list(skips)
