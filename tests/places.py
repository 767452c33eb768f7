"""Where tests run blocks: this processor, the model in memory or read block by block."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import naive
from shearling.engine.place import Place
from shearling.engine.stream import BlockStream
from shearling.engine.walk import logits_of
from shearling.files.progress import Progress, silent
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.run import Choice, Run, Wanted
from shearling.repair import refit as repairing
from shearling.repair.calibration import Calibration
from shearling.repair.result import Repair
from shearling.table.values import Keep, Shape
from tiny_cuts import relative


def place(resident: bool = True) -> Place:
    """A place of the usual sizes, as they are when it is asked for."""
    return Place.cpu(streamed=not resident)


@torch.no_grad()
def check_walk(path: Path, ids: Tensor) -> None:
    """Block by block a model is the stock one, and in a narrower type errs as much as that does."""
    checkpoint = Checkpoint.open(path)
    expected = naive.stock(path)(input_ids=ids, use_cache=False).logits
    for resident in (True, False):
        found = logits_of(BlockStream(checkpoint, place(resident)), ids)
        assert relative(found, expected) < 1e-6
    narrow = replace(place(), dtype=torch.bfloat16)
    stock = naive.stock(path, torch.bfloat16)
    plain = (stock(input_ids=ids, use_cache=False).logits - expected).norm()
    found = logits_of(BlockStream(checkpoint, narrow), ids)
    assert (found - expected).norm() < 1.25 * plain


def choose(
    source: Checkpoint,
    after: Shape,
    *,
    calibration: Calibration | None = None,
    stream: bool = False,
    **options: Any,
) -> Choice:
    """What a run of its own would cut."""
    return Run(source, calibration, place=place(not stream)).choose(Wanted(after, **options))


def prune_to(
    source: Checkpoint,
    choice: Choice,
    output: Path,
    *,
    calibration: Calibration | None = None,
    stream: bool = False,
    **options: Any,
) -> Checkpoint:
    """A choice, written by a run of its own."""
    return Run(source, calibration, place=place(not stream)).write(choice, output, **options)


def refit(
    cuttable: Checkpoint,
    keep: Keep,
    ids_NS: Tensor,
    directory: Path,
    *,
    reference: Checkpoint | None = None,
    windows: int | None = None,
    stream: bool = False,
    progress: Progress = silent,
) -> Repair:
    """A repair towards ``reference``, or else towards the model that is cut."""
    source = BlockStream(reference or cuttable, place(not stream))
    return repairing.refit(
        source, keep, ids_NS, directory, cuttable=cuttable, windows=windows, progress=progress
    )
