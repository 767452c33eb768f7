"""``shearling heal``: what the command line says, checked, and handed to :mod:`train.heal`."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shearling.commands.options import (
    Json,
    ModelOptions,
    TrainingOptions,
    note,
    print_result,
    warn,
    warn_ignored,
)
from shearling.commands.takes import takes_options
from shearling.errors import ShearlingError
from shearling.files.progress import processes

if TYPE_CHECKING:
    from shearling.train.heal import Healed
    from shearling.train.options import Options
    from shearling.train.parallel import World
    from shearling.train.setup import Training


@dataclass(frozen=True, kw_only=True)
class HealOptions:
    """What the command line says."""

    model: ModelOptions
    training: TrainingOptions
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Options such as lr=1e-4 batch=16 mix=dynamic weights.c4=0.5.",
        ),
    ] = None
    recipe: Annotated[str, typer.Option(help="cpt, lora, cpt-then-lora or distill.")] = "cpt"
    teacher: Annotated[
        str | None, typer.Option(help="The model to distil from, and to take references of.")
    ] = None
    teacher_cache: Annotated[
        Path | None, typer.Option(help="What the teacher says, from `shearling teach`, instead.")
    ] = None
    as_json: Json = False


@takes_options
def heal(options: HealOptions) -> None:
    """Retrain a model on text or from its source; goes on by itself if it was stopped."""
    from shearling.data.store import Store
    from shearling.data.teacher import Cache
    from shearling.engine.devices import own_device
    from shearling.model.checkpoint import Checkpoint
    from shearling.pruning.plan import parse_count
    from shearling.train.finish import RUN
    from shearling.train.heal import heal as run
    from shearling.train.options import parse
    from shearling.train.parallel import World
    from shearling.train.setup import Training, check, check_output
    from shearling.train.steering import inherited, references

    given, output = options.training, options.training.output
    tokens = parse_count(given.tokens, "--tokens")
    training = parse(options.recipe, tokens, settings(options.settings, given))
    source, store = Checkpoint.open(options.model.given()), Store.open(given.data)
    training = inherited(training, source, store, warn)
    check_output(output)  # before references are measured
    named = used_teacher(options.teacher, training, given)
    teacher = None if named is None else Checkpoint.open(options.model.beside(named))
    cache = None if options.teacher_cache is None else Cache.open(options.teacher_cache)
    if given.dry_run:
        losses = references(given.reference, teacher, store, training)
        planning = Training(
            source, store, training, teacher, cache, losses,
            World(device=own_device(given.device), allowed=given.allowed()),
        )  # fmt: skip
        check(planning, output)
        _print_estimate(planning, given.device, options.as_json)
        return
    with joined(given.device, given.allowed()) as (world, heard):
        losses = references(given.reference, teacher, store, training, world, run=output / RUN)
        check(Training(source, store, training, teacher, cache, losses), output)
        tell_device(world, training, given.device)
        healed = run(
            source, store, training, output, teacher=teacher, cache=cache, reference=losses,
            world=world, **heard,
        )  # fmt: skip
    if world.first:
        _print_result(healed, output, options.as_json)


def used_teacher(named: str | None, options: Options, given: TrainingOptions) -> str | None:
    """The teacher that was named, if it has anything to do; says so where it or a file has not."""
    if options.mix != "dynamic":
        warn_ignored({"--reference": given.reference}, "only mix=dynamic follows reference losses")
    measured = options.mix == "dynamic" and given.reference is None
    if options.recipe == "distill" or measured:
        return named
    warn_ignored(
        {"--teacher": named}, "nothing is distilled from it, and no reference measured on it"
    )
    return None


def settings(pairs: list[str] | None, options: TrainingOptions) -> list[str]:
    """The ``key=value`` pairs, with ``--dtype`` and ``--bos`` among them where they are given."""
    dtype = [] if options.dtype == "auto" else [f"dtype={options.dtype}"]
    bos = [] if options.bos is None else [f"bos={str(options.bos).lower()}"]
    return [*(pairs or []), *dtype, *bos]


def where(options: Options, device: str) -> str:
    """Where training would run and in which numbers, for a dry run."""
    from shearling.engine.devices import own_device
    from shearling.train.device import described

    return described(own_device(device), options.dtype, options.weight_dtype, device)


def tell_device(world: World, options: Options, asked: str) -> None:
    """Say where the first rank trains and in which numbers, and why."""
    from shearling.train.device import described

    if world.first:
        note(described(world.device, options.dtype, options.weight_dtype, asked))


@contextmanager
def joined(
    device: str = "auto", allowed: int | None = None
) -> Generator[tuple[World, dict[str, Any]]]:
    """The ranks of this run, and the listeners of its work: only the first rank speaks."""
    from shearling.engine.place import IDLE_CAP
    from shearling.engine.ranks import leave
    from shearling.files.progress import silent
    from shearling.files.terminal import progress_bars
    from shearling.train.parallel import join

    world = join(device, allowed)
    if allowed is not None and world.device.type == "cpu" and world.first:
        note(IDLE_CAP)
    try:
        with progress_bars() if world.first else nullcontext(silent) as progress:
            notify = warn if world.first else lambda sentence: None
            yield world, {"progress": progress, "notify": notify}
    finally:
        leave()


def _print_estimate(planning: Training, device: str, as_json: bool) -> None:
    from shearling.train.estimate import estimate

    source, options = planning.source, planning.options
    needed = estimate(
        source, options, planning.store.length, ranks=processes(), teacher=planning.present
    )
    lines = [needed.as_text(), where(options, device), *fitting_lines(planning)]
    print_result(needed.as_json(), as_json, lines)


def fitting_lines(planning: Training) -> list[str]:
    """How a step would fit on the GPU that is there; nothing on a CPU, or of several."""
    from shearling.train.setup import planned

    if processes() > 1:
        return []
    try:
        fit = planned(planning)
    except ShearlingError as error:
        return [f"does not fit here: {error}"]
    if fit is None:
        return []
    anew = ", activations computed anew in the backward pass" if fit.checkpointing else ""
    return [f"about {fit.micro} sequences at a time fit there{anew}."]


def _print_result(healed: Healed, output: Path, as_json: bool) -> None:
    from shearling.model.manifest import read_manifest

    if healed.model is None:
        print_stopped(healed, as_json)
        return
    manifest = read_manifest(output) or {}
    losses = manifest["losses"]
    lines = [
        f"{domain:<16} {losses['before'][domain]:.4f} -> {after:.4f} nats a token, held out"
        for domain, after in losses["after"].items()
    ]
    print_result(manifest, as_json, [*lines, f"wrote {output}"])


def print_stopped(healed: Healed, as_json: bool) -> None:
    """Say that a run was stopped, and how far it came."""
    text = f"stopped at step {healed.step} of {healed.steps}; the same command goes on from it"
    print_result({"step": healed.step, "steps": healed.steps}, as_json, [text])
