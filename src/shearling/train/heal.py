"""Healing: a cut model retrained by a recipe, and handed back as a stock checkpoint.

The output directory is a model like any other once it is done; until then it holds ``healing/``
alone, with the checkpoints and the log, from which a run that was stopped goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shearling.data.store import Store
from shearling.data.teacher import Cache
from shearling.files.progress import Progress, silent
from shearling.files.results import plain
from shearling.model.checkpoint import Checkpoint
from shearling.model.manifest import describe
from shearling.train.finish import RUN, write
from shearling.train.options import Options, tell_idle
from shearling.train.parallel import World
from shearling.train.setup import Training, at_work, check, prepared, trainer


@dataclass(frozen=True)
class Healed:
    """What became of a run: ``model`` is None where it was stopped before its end."""

    model: Checkpoint | None
    step: int
    steps: int


def heal(
    source: Checkpoint,
    store: Store,
    options: Options,
    output: Path,
    *,
    teacher: Checkpoint | None = None,
    cache: Cache | None = None,
    reference: Mapping[str, float] | None = None,
    world: World | None = None,
    progress: Progress = silent,
    notify: Callable[[str], None] = lambda message: None,
) -> Healed:
    """Retrain a model; goes on by itself from what ``output`` holds of the same run.

    Args:
        source: the model to heal; never written to.
        store: packed text of the same tokenizer.
        options: the recipe and its numbers.
        output: a new directory, or one that a stopped run left.
        teacher: for ``distill``: the model whose distribution is learned, such as the source
            that was cut; for a dynamic mix: the model that ``reference`` was measured on.
        cache: for ``distill``: what a teacher said of the store, instead of the teacher itself.
        reference: domain -> reference loss (nats), for a dynamic mix.
        world: ranks; one process alone if not given.
        progress: told how far the run is.
        notify: told what a user should know.

    Raises:
        ShearlingError: options that do not go together, data of another tokenizer, a teacher of
            another vocabulary, an output that is taken, a loss that is not finite, a full disk.
    """
    training = Training(
        source, store.within(source.shape["vocab"]), options, teacher, cache, reference,
        world or World(), progress, notify,
    )  # fmt: skip
    check(training, output)
    tell_idle(options, notify)
    with at_work(output, RUN, training.world):
        return _healed(training, output)


def _healed(training: Training, output: Path) -> Healed:
    """Every phase, then the model, unless the run is stopped before."""
    options, world = training.options, training.world
    model, step, steps = None, 0, 0
    for number, phase in enumerate(phases(options), 1):
        name = phase.recipe if phase is options else f"{number}-{phase.recipe}"
        part = replace(training, options=phase)
        model = prepared(part, model)
        running = trainer(part, model, output / RUN / name)
        running.run()
        step, steps = running.step, running.steps
        if running.stopped:  # at its last step too: what is left takes its time
            return Healed(None, step, steps)
    assert model is not None
    write(
        training.source, model, output, options, training.store,
        _taught_by(training), world, training.reference,
    )  # fmt: skip
    return Healed(Checkpoint.open(output) if world.first else None, step, steps)


def phases(options: Options) -> list[Options]:
    """The runs that a recipe consists of, each with its share of the tokens."""
    if options.recipe != "cpt-then-lora":
        return [options]
    half = max(1, options.tokens // 2)
    rest = {"tokens": max(1, options.tokens - half), "lr": options.lora_lr or options.lr}
    return [
        options.model_copy(update={"recipe": "cpt", "tokens": half}),
        options.model_copy(update={"recipe": "lora"} | rest),
    ]


def _taught_by(training: Training) -> dict[str, Any] | None:
    """The teacher, for the manifest, where it taught or its losses were followed."""
    teacher, cache, options = training.teacher, training.cache, training.options
    if cache is not None:
        return plain(cache.teacher) | {"cache": cache.fingerprint, "top": cache.top}
    if teacher is None or (options.recipe != "distill" and options.mix != "dynamic"):
        return None
    return describe(teacher)
