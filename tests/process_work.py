"""What processes of :mod:`processes` do; imported once, by the server that forks them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch

from shearling.data.store import Store
from shearling.data.teacher import Cache
from shearling.engine.ranks import leave
from shearling.gates.learn import learn
from shearling.gates.options import LearnOptions
from shearling.model.checkpoint import Checkpoint
from shearling.train.heal import heal
from shearling.train.options import Options
from shearling.train.parallel import join


def heal_rank(
    model: Path, teacher: Path | None, cache: Path | None, store: Path, output: Path, options: str,
    kill: int,
) -> None:  # fmt: skip
    """Heal as one rank of a group; killed after the step ``kill``, if there is such a step."""
    torch.set_num_threads(1)
    given, world, packed = Options.model_validate_json(options), join(), Store.open(store)

    def progress(stage: str, done: float, total: float, /) -> None:
        if done == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    heal(
        Checkpoint.open(model), packed, given, output,
        teacher=Checkpoint.open(teacher) if teacher else None,
        cache=Cache.open(cache) if cache else None,
        reference=dict.fromkeys(packed.domains, 2.0) if given.mix == "dynamic" else None,
        world=world, progress=progress,
    )  # fmt: skip
    leave()


def learn_rank(
    model: Path, sizes: dict[str, int], store: Path, output: Path, options: str, kill: int
) -> None:
    """Learn gates as one rank of a group; killed after the step ``kill`` of the training."""
    torch.set_num_threads(1)
    checkpoint, world = Checkpoint.open(model), join()

    def progress(stage: str, done: float, total: float, /) -> None:
        if stage == "training" and done == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    given = LearnOptions.model_validate_json(options)
    after = checkpoint.shape.with_(**sizes)
    learn(checkpoint, after, Store.open(store), given, output, world=world, progress=progress)
    leave()
