"""Closed-form repair after a cut: the matrices that write into the stream are solved anew.

The surviving blocks are walked in order. Each one's writers (o_proj, then down_proj) receive the
correction that brings the stream behind them nearest to the source model's stream at the place
where the block now stands, removed blocks behind it included, given the states that the repaired
blocks before it produce. Nothing is trained; shapes and configuration stay.

Several cuts of one source are repaired beside one walk of it
(:mod:`shearling.repair.source_walk`), one after the other at each block
(:mod:`shearling.repair.cut_walk`): one at a time holds sums and systems to solve. What comes of
each is what would come of it alone, bit for bit.

Shapes: N sequences of S positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from shearling.engine.moments import HELD_OUT
from shearling.engine.states import States
from shearling.engine.stream import BlockStream
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.model.checkpoint import Checkpoint
from shearling.repair.by_source import Apart
from shearling.repair.cut_walk import CutToRepair, CutWalk
from shearling.repair.experts import ExpertOptions
from shearling.repair.result import Repair
from shearling.repair.source_walk import SourceWalk
from shearling.table.values import Cut, Keep

# What else is kept of a token: for each branch what it is to bring the stream to, and what its
# writer gave; for the last one also the writer's input and the stream before what it gives.
KEPT_WIDTHS = 7  # in widths of the stream, the two streams included; beside the widest input
# Of each further cut: its stream, and what a block that stands before a gap is to bring it to and
# what its writers gave, until the source has passed the gap.
FURTHER_WIDTHS = 4


def refit(
    source: BlockStream,
    keep: Keep | Cut,
    ids_NS: Tensor,
    directory: Path,
    *,
    cuttable: Checkpoint | None = None,
    windows: int | None = None,
    final_norm: bool = True,
    experts: ExpertOptions | None = None,
    progress: Progress = silent,
) -> Repair:
    """Solve the writers of one cut anew, on tokens: as :func:`refit_all`, of a single cut.

    Raises:
        ShearlingError: as there.
    """
    wanted = CutToRepair(keep, directory, cuttable, final_norm, experts or ExpertOptions())
    (repair,) = refit_all(source, [wanted], ids_NS, windows=windows, progress=progress)
    return repair


@torch.inference_mode()
def refit_all(
    source: BlockStream,
    cuts: Sequence[CutToRepair],
    ids_NS: Tensor,
    *,
    windows: int | None = None,
    apart: Apart | None = None,
    progress: Progress = silent,
) -> list[Repair]:
    """Solve the writers of some cuts of one model anew, on tokens.

    Memory is that of one block of the source and one of a cut, beside the states of the tokens,
    which wait where the source's place says.

    Args:
        source: the model to come near to.
        cuts: what survives in each, and how it is repaired; directories of their own.
        ids_NS: calibration tokens, in the source's numbering; at least 4 sequences.
        windows: how many of the sequences are texts of their own, if those behind them are copies
            of them in the same order (:func:`shearling.repair.rewritten.augment`); all, if not
            given.
        apart: which of several sources the windows are of, to tell the damage on each.
        progress: told the blocks done.

    Returns:
        A repair for each cut; its seconds are its own and those of the source's walk.

    Raises:
        ShearlingError: too few sequences to hold any out, a state that is not finite (the block
            is named), or a ``keep`` that is not possible.
    """
    windows = len(ids_NS) if windows is None else windows
    require_enough(windows)
    with source.place.running(), States(source.place) as states:
        walk = SourceWalk(source, states)
        walks = [CutWalk(walk, wanted, number) for number, wanted in enumerate(cuts)]
        walk.begin(ids_NS, windows)
        for one in walks:
            one.begin()
        done, total = 0, sum(len(one.layers) for one in walks)
        for index in range(source.depth):
            kept = any(index in one.layers for one in walks)
            walk.step(index, kept=kept, adjoined=any(one.adjoins(index) for one in walks))
            for one in walks:
                if one.follow():
                    done += 1
                    progress("repairing the cut", done, total)
            walk.forget({one.pending for one in walks if one.pending is not None})
        for one in walks:
            one.finish(progress, apart)
    return [one.result(ids_NS) for one in walks]


def require_enough(windows: int) -> None:
    """Raise ShearlingError where there are too few sequences to hold any out."""
    if windows < HELD_OUT:
        raise ShearlingError(
            f"{windows} calibration sequences were given, but a repair needs at least "
            f"{HELD_OUT} to choose how strong it should be; raise --samples, or use --no-refit."
        )
