"""Losses of many block-removals in one walk through the model.

Variants of a model that differ only in which blocks they skip share every state up to the first
block on which they disagree. Walking all variants forward together, one state for each distinct
set of blocks skipped so far, reads each block's weights once and computes no state twice: exact,
and for the n single removals of n blocks about half the work of running each. The same walk
serves the perplexity criterion, greedy removal and damage curves.

Shapes: N sequences, split into batches of B; S positions, D hidden.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from shearling.engine.products import fast_products
from shearling.engine.states import States
from shearling.engine.stream import BlockStream
from shearling.files.progress import Progress, silent

Removed = frozenset[int]


@torch.inference_mode()
@fast_products()
def removal_nll(
    stream: BlockStream,
    ids_NS: Tensor,
    removals: Sequence[Removed],
    *,
    progress: Progress = silent,
    stage: str = "running the blocks",
) -> list[float]:
    """Mean negative log-likelihood of the model without each of some sets of blocks.

    Args:
        stream: the model.
        ids_NS: calibration tokens.
        removals: sets of block numbers; the empty set is the intact model.
        progress: told the block runs done, of a total known beforehand.
        stage: what to call this in the progress.

    Returns:
        Nats per predicted token (the first of each sequence is not predicted), by removal.
    """
    wanted = list(dict.fromkeys(removals))
    batches = stream.batches(ids_NS)
    plan = [_step(wanted, block) for block in range(stream.depth)]
    # The head costs about as much as it has parameters; it is counted in runs of a block.
    total = sum(len(runs) for runs, _ in plan) + len(wanted)
    done = 0
    with tempfile.TemporaryDirectory(prefix="shearling-") as scratch:
        states = States(None if stream.resident else Path(scratch))
        calls = []
        for number, ids_BS in enumerate(batches):
            h_BSD, call = stream.begin(ids_BS)
            states.put(frozenset(), number, h_BSD)
            calls.append(call)
        for index, (runs, skips) in enumerate(plan):
            for key in skips:
                for number in range(len(batches)):
                    if key in runs:
                        states.put(key | {index}, number, states.get(key, number))
                    else:
                        states.move(key, key | {index}, number)
            if not runs:  # every variant skips it: its weights are not even read
                continue
            with stream.block(index) as block:
                for key in runs:
                    for number, call in enumerate(calls):
                        states.put(key, number, call[index](block, states.get(key, number)))
                    done += 1
                    progress(stage, done, total)
        losses: dict[Removed, float] = {}
        for key in wanted:
            nll = [
                stream.nll(states.get(key, number), ids_BS).double().sum()
                for number, ids_BS in enumerate(batches)
            ]
            losses[key] = float(sum(nll)) / (ids_NS.shape[0] * (ids_NS.shape[1] - 1))
            done += 1
            progress(stage, done, total)
    return [losses[removed] for removed in removals]


def _step(wanted: Sequence[Removed], block: int) -> tuple[list[Removed], list[Removed]]:
    """Keys of the states that run ``block``, and of those from which some variant skips it."""
    runs: dict[Removed, None] = {}
    skips: dict[Removed, None] = {}
    for removed in wanted:
        key = frozenset(b for b in removed if b < block)
        (skips if block in removed else runs)[key] = None
    return list(runs), list(skips)
