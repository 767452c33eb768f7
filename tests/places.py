"""Where tests run blocks: this processor, the model in memory or read block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from shearling.engine.place import Place
from shearling.engine.stream import BlockStream
from shearling.files.progress import Progress, silent
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.run import Choice, Run, Wanted
from shearling.repair import refit as repairing
from shearling.repair.calibration import Calibration
from shearling.repair.result import Repair
from shearling.table.values import Keep, Shape


def place(resident: bool = True) -> Place:
    """A place of the usual sizes, as they are when it is asked for."""
    return Place.cpu(streamed=not resident)


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
