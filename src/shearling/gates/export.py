"""From trained gates to a stock model of exactly the target shape.

The gates are folded into the weights, which gives a checkpoint of the source's geometry; that is
cut to the units whose gates are highest, as any checkpoint is, proof included.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shearling.engine.place import Place
from shearling.engine.stream import BlockStream
from shearling.files.progress import Progress, silent
from shearling.files.scratch import scratch
from shearling.files.writer import write_json
from shearling.gates.attach import folder
from shearling.gates.learner import Learner
from shearling.gates.options import LearnOptions
from shearling.gates.results import GateStep, LearningHistory
from shearling.model.checkpoint import Checkpoint
from shearling.model.manifest import MANIFEST, ModelManifest
from shearling.model.refs import ModelRef
from shearling.pruning.cut import cut
from shearling.repair.refit import refit
from shearling.table.values import Keep
from shearling.train.finish import looks_at, manifest, move_into, save
from shearling.train.log import read as read_log
from shearling.train.reference import measure
from shearling.train.results import Look
from shearling.train.setup import Training

RUN = "learning"  # in the output directory: checkpoints, logs and what the report shows
FILE = "learning.json"
BINS = 20


def export(
    training: Training, model: nn.Module, learner: Learner, log: Path, output: Path, ids_NS: Tensor
) -> None:
    """Write the cut model into ``output``, with its manifest and what the report shows.

    All ranks have to call this; the first one writes.

    Args:
        training: the run, whose store's held-out part decides whether a repair is kept.
        model: live, gates attached.
        learner: of those gates.
        log: the folder of the run's log.
        output: holds ``learning/``.
        ids_NS: tokens for the repair.
    """
    source, world = training.source, training.world
    learner.finish()
    name = output.resolve().name
    whole, staging = output / RUN / "gated", output / RUN / ".model.partial"
    files = save(source, model, whole, world, folder(source, learner.bank))
    if not world.first:
        return
    keep, lost = learner.bank.keep(), learner.lost()
    looks = looks_at([log])
    # Of the trained model before the cut, whose child the result is.
    told = manifest(
        "learn", f"{source.name}-gated", source, Checkpoint.open(whole), training.options,
        training.store, looks,
    )  # fmt: skip
    write_json(whole / MANIFEST, replace(told, probability_lost=lost, files=files).to_json())
    missed = {axis: share for axis, share in lost.items() if share > 0.02}
    if missed:
        training.notify(
            "the gates had not settled when the run ended: the cut closes gates that hold "
            + ", ".join(f"{share:.0%} of what was open of {axis}" for axis, share in missed.items())
            + "; more tokens, or a smaller rise, would let them settle."
        )
    shutil.rmtree(staging, ignore_errors=True)
    gated = Checkpoint.open(whole)
    cut_model = cut(gated, keep, staging, progress=training.progress)
    if _options(training).refit:
        cut_model = _repaired(training, gated, keep, cut_model, ids_NS)
    made = ModelManifest.load(staging)  # of a cut, which was made under another name
    assert made is not None, "cut wrote it"
    write_json(staging / MANIFEST, replace(made, model=replace(made.model, name=name)).to_json())
    write_json(
        output / RUN / FILE,
        _history(cut_model, learner, log, keep, looks, name) | {"reference": _followed(training)},
    )
    shutil.rmtree(whole)
    move_into(output, staging)


def _options(training: Training) -> LearnOptions:
    options = training.options
    assert isinstance(options, LearnOptions)
    return options


def _followed(training: Training) -> dict[str, float] | None:
    """Losses that a dynamic mix followed."""
    dynamic = training.options.mix == "dynamic"
    return dict(training.reference) if training.reference and dynamic else None


def _cut_and_repair(
    source: Checkpoint, keep: Keep, output: Path, ids_NS: Tensor, *,
    reference: Checkpoint, progress: Progress = silent,
) -> Checkpoint:  # fmt: skip
    """Cut to ``keep``, repaired on tokens (N, S) towards ``reference``."""
    with scratch() as directory:
        towards = BlockStream(reference, Place.best(reference))
        solved = refit(towards, keep, ids_NS, directory, cuttable=source, progress=progress)
        return cut(
            source, keep, output, replaced=solved.replaced, options={"repair": solved.as_json()},
            progress=progress,
        )  # fmt: skip


def _repaired(
    training: Training, gated: Checkpoint, keep: Keep, plain: Checkpoint, ids_NS: Tensor
) -> Checkpoint:
    """The better on held-out text of the plain cut and a repaired one, where the plain one is."""
    place = plain.path.with_name(".repaired.partial")
    shutil.rmtree(place, ignore_errors=True)
    with torch.inference_mode():
        other = _cut_and_repair(
            gated, keep, place, ids_NS, reference=training.source, progress=training.progress
        )
    sequences = training.options.eval_sequences
    before, after = (_mean(measure(each, training.store, sequences)) for each in (plain, other))
    if after < before:
        shutil.rmtree(plain.path)
        place.replace(plain.path)
        training.notify(
            f"the repair after the cut takes the held-out loss from {before:.4f} to {after:.4f}."
        )
        return Checkpoint.open(plain.path)
    shutil.rmtree(place)
    training.notify(
        f"a repair after the cut would take the held-out loss from {before:.4f} to {after:.4f}, "
        "and is left out."
    )
    return plain


def _mean(losses: Mapping[str, float]) -> float:
    return sum(losses.values()) / len(losses)


def _history(
    written: Checkpoint, learner: Learner, log: Path, keep: Keep, looks: list[dict[str, Any]],
    name: str,
) -> dict[str, Any]:  # fmt: skip
    """What the report draws: sizes over time, where the gates ended, what survived."""
    trained = [record for record in read_log(log) if record["kind"] == "train"]
    bank = learner.bank
    return LearningHistory(
        model=ModelRef(name, written.fingerprint),
        gates=learner.kind,
        source_shape=dict(bank.shape),
        targets={axis: rows.target for axis, rows in bank.rows.items()},
        units={axis: rows.units for axis, rows in bank.rows.items()},
        steps=tuple(
            GateStep(**{key: record[key] for key in ("step", "tokens", "loss")} | record["gates"])
            for record in trained
        ),
        looks=tuple(Look(**look) for look in looks),
        histograms={axis: tuple(_histogram(bank, axis)) for axis in bank.rows},
        probability_lost=learner.lost(),
        keep=keep.as_json(),
    ).to_json()


def _histogram(bank: Any, axis: str) -> list[int]:
    """How many gates of an axis ended in each twentieth of their range, before any is closed."""
    from shearling.gates.hard_concrete import open_probability

    mass = open_probability(bank.log_alpha[axis].detach()).flatten()
    return torch.histc(mass.float(), bins=BINS, min=0, max=1).int().tolist()
