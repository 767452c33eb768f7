"""Checkpoints of a run, by torch.distributed.checkpoint, in safetensors: no pickle, any ranks.

A checkpoint is a directory ``step-00000100`` with the weights and the optimiser's moments (each
rank writes its own part; another number of ranks reads it) and ``state.json`` with all the rest:
step, data position, mixture, history. It gets its name when it is whole; a run that is killed
while writing leaves the one before.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from shearling.errors import ShearlingError
from shearling.files.writer import disk_errors, order_metadata, sync_tree, write_json
from shearling.train.optimiser import moments
from shearling.train.parallel import World

STATE = "state.json"
_NAME = re.compile(r"step-(\d{8})")


def tensors(module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Trained parameters and their moments by name; moments are made if there are none yet."""
    found: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        found[f"weight.{name}"] = parameter.detach()
        for moment, tensor in moments(optimiser, parameter).items():
            found[f"{moment}.{name}"] = tensor
    return found


def save(
    folder: Path, step: int, held: Mapping[str, Tensor], state: Mapping[str, Any], world: World,
    *, keep: int, every: int = 1,
) -> Path:  # fmt: skip
    """Write a checkpoint, then remove all but the last ``keep``, one being due ``every`` so often.

    Raises:
        ShearlingError: the disk ran full; the checkpoints before are still there.
    """
    final, staging = folder / f"step-{step:08}", folder / f".step-{step:08}.partial"
    if world.first:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    world.barrier()
    try:
        with disk_errors(final):
            _write(dict(held), staging, world)
            world.barrier()
            if world.first:
                for file in staging.glob("*.safetensors"):
                    order_metadata(file)
                write_json(staging / STATE, dict(state) | {"step": step})
                sync_tree(staging)
                shutil.rmtree(final, ignore_errors=True)
                os.replace(staging, final)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    if world.first:
        for old in _superseded(_all(folder), keep, every):
            _remove(old)
    world.barrier()
    return final


def _superseded(checkpoints: list[Path], keep: int, every: int) -> list[Path]:
    """All but the newest and the last ``keep`` of those that were due.

    One that a stop left between two of them goes as soon as there is a newer, so that a run holds
    the same in the end whether it was stopped or not.
    """
    *old, newest = checkpoints
    due = [path for path in old if _step(path) % every == 0]
    kept = {*due[len(due) - (keep - 1) :], newest}
    return [path for path in checkpoints if path not in kept]


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint that nobody can then take for a whole one, wherever this is stopped."""
    gone = checkpoint.with_name(f".{checkpoint.name}.removed")
    os.replace(checkpoint, gone)
    shutil.rmtree(gone)


def clear(folder: Path) -> None:
    """Remove what a killed run was writing or removing; whoever calls has the folder alone."""
    for left in folder.glob(".step-*") if folder.is_dir() else ():
        shutil.rmtree(left)


def _write(held: dict[str, Tensor], staging: Path, world: World) -> None:
    try:
        with warnings.catch_warnings():  # that one process is one process
            warnings.simplefilter("ignore", UserWarning)
            dcp.save(
                held,
                storage_writer=HuggingFaceStorageWriter(str(staging), save_distributed=True),
                no_dist=world.size == 1,
            )
    except dcp.api.CheckpointException as error:  # holds each rank's own error
        first = next(iter(error.failures.values()))[0]  # an interrupt may be among them
        raise first if isinstance(first, BaseException) else error from error


def last(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    found = _all(folder)
    return found[-1] if found else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What ``save`` was given as state, and the step.

    Raises:
        ShearlingError: the file is damaged.
    """
    try:
        return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ShearlingError(
            f"{checkpoint} is not a whole checkpoint ({error}); remove it, and the run goes on "
            "from the one before."
        ) from error


def load(checkpoint: Path, held: Mapping[str, Tensor], world: World) -> None:
    """Read tensors into what ``tensors`` gave, in place, each rank its own part.

    Raises:
        ShearlingError: the checkpoint holds other tensors, or is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(
                dict(held), storage_reader=HuggingFaceStorageReader(str(checkpoint)),
                no_dist=world.size == 1,
            )  # fmt: skip
    except (dcp.api.CheckpointException, RuntimeError, ValueError, KeyError) as error:
        raise ShearlingError(
            f"{checkpoint} cannot be read into this model ({' '.join(str(error).split())[:200]}); "
            "name a new output directory, or remove that checkpoint."
        ) from error


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _all(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
