"""``shearling learn``: what the command line says, checked, and handed to :mod:`gates.learn`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shearling.commands.heal import (
    fitting_lines,
    joined,
    print_stopped,
    settings,
    tell_device,
    used_teacher,
    where,
)
from shearling.commands.options import (
    Json,
    ModelOptions,
    TrainingOptions,
    print_result,
    warn,
)
from shearling.commands.takes import takes_options
from shearling.files.progress import processes

if TYPE_CHECKING:
    from shearling.model.checkpoint import Checkpoint
    from shearling.table.values import Shape
    from shearling.train.heal import Healed
    from shearling.train.setup import Training


@dataclass(frozen=True, kw_only=True)
class LearnCommandOptions:
    """What the command line says."""

    model: ModelOptions
    shape: Annotated[
        str, typer.Option(help="Sizes after the cut, such as hidden=512,layers=24,mlp=1024.")
    ]
    training: TrainingOptions
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Options such as lr=1e-4 gates=top-k mix=dynamic refit=false.",
        ),
    ] = None
    recipe: Annotated[
        str,
        typer.Option(
            help="scores: cut at once, all tokens for healing; warm: gates that start from the "
            "scores; sheared: the paper's, from open gates."
        ),
    ] = "scores"
    teacher: Annotated[
        str | None, typer.Option(help="A model to distil from, and to take references of.")
    ] = None
    distil: Annotated[
        bool, typer.Option(help="Learn from the teacher's distribution instead of the text.")
    ] = False
    as_json: Json = False


@takes_options
def learn(options: LearnCommandOptions) -> None:
    """Learn which units to keep while training, and cut to exactly the shape asked for.

    Goes on by itself if it was stopped.
    """
    from shearling.data.store import Store
    from shearling.engine.devices import own_device
    from shearling.gates.export import RUN
    from shearling.gates.learn import check
    from shearling.gates.learn import learn as run
    from shearling.gates.options import parse
    from shearling.model.checkpoint import Checkpoint
    from shearling.pruning.exportable import tell_limits
    from shearling.pruning.plan import parse_count, parse_shape
    from shearling.train.finish import RUN as HEALING
    from shearling.train.parallel import World
    from shearling.train.setup import Training, check_output
    from shearling.train.steering import references

    given, output = options.training, options.training.output
    tokens = parse_count(given.tokens, "--tokens")
    pairs = settings(options.settings, given)
    learning = parse(options.recipe, tokens, pairs, distil=options.distil)
    source, store = Checkpoint.open(options.model.given()), Store.open(given.data)
    after = parse_shape(options.shape, source)
    folder = HEALING if learning.gates == "scores" else RUN
    check_output(output, folder)
    tell_limits(source, after, warn)
    named = used_teacher(options.teacher, learning, given)
    teacher = None if named is None else Checkpoint.open(options.model.beside(named))
    if teacher is None and learning.mix == "dynamic" and given.reference is None:
        teacher = source  # the second of the paper's two references: the source's own losses
    distilled = teacher if options.distil else None
    followed = teacher if named else None  # the run is then of that teacher
    if given.dry_run:
        losses = references(given.reference, teacher, store, learning)
        planning = Training(
            source, store, learning, teacher, None, losses,
            World(device=own_device(given.device), allowed=given.allowed()),
        )  # fmt: skip
        check(planning, after, output)
        _print_plan(planning, after, distilled, given.device, options.as_json)
        return
    with joined(given.device, given.allowed()) as (world, heard):
        losses = references(
            given.reference, teacher, store, learning, world, run=output / folder,
            named=named is not None,
        )  # fmt: skip
        check(Training(source, store, learning, teacher, None, losses), after, output)
        tell_device(world, learning, given.device)
        learned = run(
            source, after, store, learning, output, teacher=followed, reference=losses,
            world=world, **heard,
        )  # fmt: skip
    if world.first:
        _print_result(learned, output, options.as_json)


def _print_plan(
    planning: Training, after: Shape, teacher: Checkpoint | None, device: str, as_json: bool
) -> None:
    from shearling.gates.bank import lay_out
    from shearling.gates.options import trained
    from shearling.train.estimate import estimate

    source, options = planning.source, planning.options
    healed = trained(source, after, options)
    training = estimate(healed, options, planning.store.length, ranks=processes(), teacher=teacher)
    # Where the model is cut at once, there are no gates.
    rows = () if healed is not source else lay_out(source.layout, source.shape, after)
    count = source.layout.count
    plan: dict[str, Any] = {
        "parameters": count(after), "source_parameters": count(source.shape),
        "gates": {r.axis: {"rows": r.rows, "units": r.units, "target": r.target} for r in rows},
        "training": training.as_json(),
    }  # fmt: skip
    lines = [
        "; ".join(
            [
                f"{count(source.shape):,} -> {count(after):,} parameters",
                *(f"{r.axis}: {r.target} of {r.units} in each of {r.rows}" for r in rows),
            ]
        ),
        training.as_text(),
        where(options, device),
        *fitting_lines(replace(planning, source=healed)),
    ]
    print_result(plan, as_json, lines)


def _print_result(learned: Healed, output: Path, as_json: bool) -> None:
    from shearling.model.manifest import read_manifest

    if learned.model is None:
        print_stopped(learned, as_json)
        return
    manifest = read_manifest(output) or {}
    line = (
        f"{output}: {manifest['parameters']:,} parameters ({learned.model.shape}); go on with "
        f"`shearling heal {output}`"
    )
    print_result(manifest, as_json, [line])
