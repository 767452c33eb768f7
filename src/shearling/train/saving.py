"""Checkpoints of a run, by torch.distributed.checkpoint, in safetensors: no pickle, any ranks.

A checkpoint is a directory ``step-00000100`` with the weights and the optimiser's moments (each
rank writes its own part; another number of ranks reads it) and ``state.json`` with all the rest:
step, data position, mixture, history. It gets its name when it is whole; a run that is killed
while writing leaves the one before.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from shearling.errors import ShearlingError
from shearling.files.reading import read_json
from shearling.files.results import OwnFile, entry, plain, refuse
from shearling.files.writer import disk_errors, order_metadata, sync_tree, write_json
from shearling.train.optimiser import moments
from shearling.train.parallel import World

STATE = "state.json"
_NAME = re.compile(r"step-(\d{8})")


def tensors(module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Trained parameters and their moments by name; moments are made if there are none yet."""
    by_name: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        by_name[f"weight.{name}"] = parameter.detach()
        for moment, tensor in moments(optimiser, parameter).items():
            by_name[f"{moment}.{name}"] = tensor
    return by_name


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
                write_json(staging / STATE, CheckpointState(**state, step=step).to_json())
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
    due = [path for path in old if step_of(path) % every == 0]
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
    """The newest checkpoint, or None."""
    checkpoints = _all(folder)
    return checkpoints[-1] if checkpoints else None


def newest_first(folder: Path) -> list[Path]:
    """All checkpoints, to be tried in this order."""
    return _all(folder)[::-1]


def remove(checkpoint: Path, world: World) -> None:
    """Remove a checkpoint that cannot be read, or it would count as the newest."""
    if world.first:
        shutil.rmtree(checkpoint, ignore_errors=True)
    world.barrier()


@dataclass(frozen=True)
class CheckpointState(OwnFile):
    """What a checkpoint holds besides tensors."""

    kind: ClassVar[str] = "checkpoint"
    written_by: ClassVar[str] = "`heal` and `learn`, as `state.json` of a checkpoint"
    advice: ClassVar[str] = "remove that checkpoint, and the run goes on from the one before"

    identity: dict[str, Any] = entry("what a run must share to go on: model, data, options")
    mixture: dict[str, Any] = entry("the order of the data: `seed`, `batch`, `sizes`, `taken`")
    weights: dict[str, Any] = entry("of the domains: the mix's `kind` and state")
    step: int = entry()

    def to_json(self) -> dict[str, Any]:
        """The file's content, which has no ``kind``: it lies in a checkpoint and nowhere else."""
        return plain(self)


def read_state(checkpoint: Path) -> CheckpointState:
    """What ``save`` was given as state, and the step.

    Raises:
        DamagedCheckpoint: the file is missing or damaged.
    """
    file = checkpoint / STATE
    try:
        state = CheckpointState.from_json(read_json(file, CheckpointState.advice), file)
        if checkpoint.name != f"step-{state.step:08}":
            refuse(file, "step", f"that of {checkpoint.name}", state.step)
    except ShearlingError as error:
        raise DamagedCheckpoint(
            f"{checkpoint} is not a whole checkpoint: {str(error).rstrip('.')}."
        ) from error
    return state


class DamagedCheckpoint(ShearlingError):
    """A checkpoint that lacks a file, or has one that is truncated."""


def load(checkpoint: Path, held: Mapping[str, Tensor], world: World) -> None:
    """Read tensors into what ``tensors`` gave, in place, each rank its own part.

    Raises:
        DamagedCheckpoint: the checkpoint holds other tensors, or is damaged.
    """
    _check_headers(checkpoint)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(
                dict(held), storage_reader=HuggingFaceStorageReader(str(checkpoint)),
                no_dist=world.size == 1,
            )  # fmt: skip
    except (dcp.api.CheckpointException, Exception) as error:  # readers of damaged bytes raise any
        failures = getattr(error, "failures", None)  # each rank's own
        first = next(iter(failures.values()))[0] if failures else error
        if isinstance(first, MemoryError):
            raise
        raise DamagedCheckpoint(
            f"{checkpoint} cannot be read into this model ({' '.join(str(first).split())[:200]}); "
            "name a new output directory, or remove that checkpoint."
        ) from error


def _check_headers(checkpoint: Path) -> None:
    """Raise DamagedCheckpoint where there are no tensors, or a file of them is cut off.

    The reader would find it too, and write a traceback to the terminal.
    """
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise DamagedCheckpoint(f"{checkpoint} lacks its tensors; remove that checkpoint.")
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise DamagedCheckpoint(
                f"{file} is truncated or corrupt ({error}); remove that checkpoint."
            ) from error


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def _all(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
