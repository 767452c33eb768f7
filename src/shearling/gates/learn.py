"""Learning what to keep: gates trained together with the weights, then a cut to the exact shape.

Sheared LLaMA's first stage (2310.06694, section 2.1) on the loop of healing: the objective's model
computes with gates (:mod:`shearling.gates.attach`), the loop draws them anew at every step, and at
the end the gates are folded into the weights and the units with the lowest gates cut off. Until
then the output holds ``learning/`` alone, from which a run that was stopped goes on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from shearling.data.bos import TokenWindows
from shearling.data.sources import TextSource
from shearling.data.store import Store
from shearling.engine.place import Place, Wish
from shearling.errors import ShearlingError, reason
from shearling.files.progress import Progress, silent
from shearling.files.reading import read_json
from shearling.files.staging import partial
from shearling.files.writer import write_json
from shearling.gates import start
from shearling.gates.attach import attach
from shearling.gates.attach import check as check_gates
from shearling.gates.bank import GateBank
from shearling.gates.export import RUN, export
from shearling.gates.learner import Learner
from shearling.gates.options import LearnOptions
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.plan import require_smaller
from shearling.pruning.run import Run, Wanted, repair_need
from shearling.repair.calibration import Tokens
from shearling.table.kinds import described
from shearling.table.values import Shape
from shearling.train import heal as healing
from shearling.train import saving
from shearling.train.heal import Healed
from shearling.train.options import tell_idle
from shearling.train.parallel import World
from shearling.train.setup import Training, at_work, mixed, prepared, trainer
from shearling.train.setup import check as check_training

START = "start.safetensors"
GATES = "gates"  # the folder of the run's checkpoints


def learn(
    source: Checkpoint,
    after: Shape,
    store: Store,
    options: LearnOptions,
    output: Path,
    *,
    teacher: Checkpoint | None = None,
    reference: Mapping[str, float] | None = None,
    world: World | None = None,
    progress: Progress = silent,
    notify: Callable[[str], None] = lambda message: None,
) -> Healed:
    """Learn which units of a model to keep, and cut it to exactly ``after``.

    Goes on by itself from what ``output`` holds of the same run.

    Args:
        source: the model; never written to.
        after: every axis with its size after the cut.
        store: packed text of the model's tokenizer.
        options: see :class:`LearnOptions`.
        output: a new directory, or one that a stopped run left.
        teacher: distil from this model while learning.
        reference: domain -> reference loss (nats), for a dynamic mix.
        world: ranks; one process alone if not given.
        progress: told how far the run is.
        notify: told what a user should know.

    Raises:
        ShearlingError: a shape that cannot be reached or is the model's own, and all that healing
            refuses; multipliers that run away.
    """
    store = store.within(source.shape["vocab"])
    training = Training(
        source, store, options, teacher, None, reference, world or World(), progress, notify
    )
    check(training, after, output)
    weights = mixed(store, options, reference)
    windows = start.windows(
        store, weights.current, options.samples, options.sample_length, options.seed
    )
    if options.gates == "scores":
        return _by_scores(training, options, after, output, windows)
    tell_idle(options, notify)
    with at_work(output, RUN, training.world):
        return _by_gates(training, options, after, output, windows.ids_NS)


def _by_gates(
    training: Training, options: LearnOptions, after: Shape, output: Path, ids_NS: Tensor
) -> Healed:
    """Train gates and weights together, then cut."""
    source, world = training.source, training.world
    learner = _learner(training, options, after, output, ids_NS)
    model = prepared(training, None)
    once = training.world.device.type == "cuda" and training.world.size == 1
    attach(source, model, learner.bank, once=once)
    running = trainer(training, model, output / RUN / GATES, learner=learner, shape=after)
    running.run()
    if running.stopped:  # at its last step too: what is left takes its time
        return Healed(None, running.step, running.steps)
    export(training, model, learner, running.folder, output, ids_NS)
    return Healed(Checkpoint.open(output) if world.first else None, running.step, running.steps)


def check(training: Training, after: Shape, output: Path) -> None:
    """Refuse what cannot work before anything is loaded (ShearlingError)."""
    source, store, options = training.source, training.store, training.options
    assert isinstance(options, LearnOptions)
    check_shape(source, after, gated=options.gates != "scores")
    if options.sample_length > store.length and (options.warm_start or options.refit):
        raise ShearlingError(
            f"sample_length={options.sample_length} was given, but {store.path} holds sequences of "
            f"{store.length} tokens; give at most that."
        )
    check_training(training, output, healing.RUN if options.gates == "scores" else RUN)


def check_shape(source: Checkpoint, after: Shape, *, gated: bool = True) -> None:
    """Refuse a shape that cannot be learned (ShearlingError); ``gated`` where gates are trained."""
    source.family.check(source.config, after)
    require_smaller(after, source.shape)
    if source.layout.routed:
        raise ShearlingError(
            f"{source.name} has experts, on which no gates are learned yet; use "
            "`shearling prune --shape experts=N` and `shearling heal`."
        )
    if source.layout.kinds and after["layers"] != source.shape["layers"]:
        raise ShearlingError(
            f"{source.name} has blocks of several kinds ({described(source.layout.kinds)}), of "
            "which gates might leave none of one; learn widths, and remove blocks with "
            "`shearling prune`."
        )
    if after["vocab"] != source.shape["vocab"]:
        raise ShearlingError(
            f"vocab={after['vocab']} was asked for, but which tokens stay is not learned; cut the "
            f"vocabulary with `shearling prune --shape vocab={after['vocab']}` first."
        )
    if gated:
        check_gates(source, GateBank(source.layout, source.shape, after))


def _learner(
    training: Training, options: LearnOptions, after: Shape, output: Path, ids_NS: Tensor
) -> Learner:
    """Gates at their start, which a run that goes on finds where it was first put."""
    source, world = training.source, training.world
    bank = GateBank(source.layout, source.shape, after)
    file = output / RUN / START
    told, trained = _told(training, options, after, ids_NS), output / RUN / GATES
    due = world.agreed(world.first and _is_due(file, _made_for(file), told, trained, training))
    if due and options.warm_start:  # all ranks score
        place = Place.best(
            source, Wish(device=str(world.device), memory=world.allowed, ranks=world)
        )
        blocks, units = start.score(source, after, ids_NS, place=place, progress=training.progress)
        start.set_out(bank, blocks, units, options.spread)
    elif due:
        generator = torch.Generator().manual_seed(options.seed)
        with torch.no_grad():
            for a in bank.log_alpha.values():
                a += 0.01 * torch.randn(a.shape, generator=generator)
    if world.first and due:
        file.parent.mkdir(parents=True, exist_ok=True)
        staging = partial(file)
        first_gates = {axis: a.detach() for axis, a in bank.log_alpha.items()}
        save_file(first_gates, staging, metadata={RUN: told})
        staging.replace(file)
    world.wait_for(file)
    _set(bank, file)
    steps = options.steps(training.store.length)
    kind: Any = options.gates
    return Learner(
        bank.to(world.device), kind=kind, constraint=options.constraint, seed=options.seed,
        rise=round(options.rise * steps), lr=options.gate_lr,
        multiplier_lr=options.multiplier_lr,
    )  # fmt: skip


def _set(bank: GateBank, file: Path) -> None:
    """Put gates where a file has them (ShearlingError if it has others, or is damaged)."""
    try:
        kept = load_file(file)
    except (OSError, SafetensorError) as error:
        raise _damaged(file, f"it cannot be read: {reason(error)}") from error
    if set(kept) != set(bank.log_alpha):
        raise _damaged(file, f"it holds {sorted(kept)}, and {sorted(bank.log_alpha)} are learned")
    for axis, gates_RU in bank.log_alpha.items():
        a, wanted = kept[axis], list(gates_RU.shape)
        if list(a.shape) != wanted or not a.is_floating_point() or not bool(a.isfinite().all()):
            raise _damaged(
                file, f"{axis} is of {list(a.shape)} {a.dtype}, and finite numbers of {wanted} fit"
            )
        with torch.no_grad():
            gates_RU.copy_(a)


def _damaged(file: Path, why: str) -> ShearlingError:
    return ShearlingError(
        f"{file}, where gates began, is damaged ({why}); remove the output directory, or name a "
        "new one."
    )


def _told(training: Training, options: LearnOptions, after: Shape, ids_NS: Tensor) -> str:
    """All that gates begin from, as a digest."""
    facts = {
        "model": training.source.fingerprint,
        "shape": dict(after),
        "tokens": sha256(ids_NS.cpu().numpy().tobytes()).hexdigest(),
        "options": options.model_dump(include={"warm_start", "spread", "seed", "refit", "gates"}),
    }
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _made_for(file: Path) -> str | None:
    """The digest that gates in a file carry, if there is one."""
    try:
        with safe_open(file, "pt") as opened:
            return (opened.metadata() or {}).get(RUN)
    except (OSError, SafetensorError):
        return None


def _is_due(
    kept: Path, made_for: str | None, told: str, folder: Path, training: Training
) -> bool:  # fmt: skip
    """Whether what a run begins from has to be made: there is none, or it is of other options.

    Raises:
        ShearlingError: steps were trained from what other options made; ``folder`` has them.
    """
    begun = saving.last(folder) is not None
    if kept.exists() and (made_for == told or (made_for is None and begun)):
        return False
    if begun:
        raise ShearlingError(
            f"{kept} is of a run with another model, data, shape or options; name a new output "
            "directory, or remove that one."
        )
    if kept.exists():
        training.notify(f"{kept} is of a run with other options, and is made anew.")
    return True


def _by_scores(
    training: Training, options: LearnOptions, after: Shape, output: Path, windows: TokenWindows
) -> Healed:
    """No gates: what ``shearling prune --no-rotate`` does, and all of the tokens for healing it.

    A rotated stream starts ahead and heals worse (LOG.md).
    """
    place, store, world = output / healing.RUN / "cut", training.store, training.world
    note, told = place.with_suffix(".json"), _told(training, options, after, windows.ids_NS)
    made_for = read_json(note).get(RUN) if note.is_file() else None
    folder = output / healing.RUN / options.recipe
    with at_work(output, healing.RUN, world):
        if world.agreed(world.first and _is_due(place, made_for, told, folder, training)):
            if world.first:
                shutil.rmtree(place, ignore_errors=True)
            sizes = windows.ids_NS.shape
            text = Tokens(
                (TextSource(store.path),), *sizes, options.seed, shares=(), written=0,
                tokens=windows,
            )  # fmt: skip
            wish = Wish(device=str(world.device), memory=world.allowed, ranks=world)
            where = Place.best(training.source, wish, repair_need(training.source, text))
            run = Run(training.source, text, place=where, progress=training.progress)
            choice = run.choose(Wanted(after, repaired=options.refit))
            run.write(choice, place, repaired=options.refit)
            if world.first:
                write_json(note, {RUN: told})
        world.barrier()
    return healing.heal(
        Checkpoint.open(place), store, options.healing(), output, teacher=training.teacher,
        reference=training.reference, world=world, progress=training.progress,
        notify=training.notify,
    )  # fmt: skip
