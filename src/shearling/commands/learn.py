"""``shearling learn``: what the command line says, checked, and handed to :mod:`gates.learn`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shearling.commands.heal import progress_of, references, tell_device, with_dtype
from shearling.commands.options import (
    Device,
    Dtype,
    Json,
    Model,
    References,
    RunOutput,
    TokenStore,
    TrainingTokens,
    warn,
)

if TYPE_CHECKING:
    from shearling.gates.options import LearnOptions
    from shearling.model.checkpoint import Checkpoint
    from shearling.table.axes import Shape
    from shearling.train.heal import Healed


def learn(
    model: Model,
    shape: Annotated[
        str, typer.Option(help="Sizes after the cut, such as hidden=512,layers=24,mlp=1024.")
    ],
    data: TokenStore,
    tokens: TrainingTokens,
    output: RunOutput,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Options such as lr=1e-4 gates=top-k mix=dynamic refit=false.",
        ),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help="scores: cut at once, all tokens for healing; warm: gates that start from the "
            "scores; sheared: the paper's, from open gates."
        ),
    ] = "scores",
    teacher: Annotated[
        str | None, typer.Option(help="A model to distil from, and to take references of.")
    ] = None,
    reference: References = None,
    distil: Annotated[
        bool, typer.Option(help="Learn from the teacher's distribution instead of the text.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be cut, and train nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Learn which units to keep while training, and cut to exactly the shape asked for.

    Goes on by itself if it was stopped.
    """
    from shearling.data.store import Store
    from shearling.gates.learn import check
    from shearling.gates.learn import learn as run
    from shearling.gates.options import parse
    from shearling.model.checkpoint import Checkpoint
    from shearling.pruning.plan import parse_count, parse_shape
    from shearling.train.parallel import join, leave
    from shearling.train.setup import Training

    options = parse(
        recipe, parse_count(tokens, "--tokens"), with_dtype(settings, dtype), distil=distil
    )
    source, store = Checkpoint.open(model), Store.open(data)
    after = parse_shape(shape, source)
    wise = None if teacher is None else Checkpoint.open(teacher)
    if wise is None and options.mix == "dynamic" and reference is None:
        wise = source  # the second of the paper's two references: the source's own losses
    losses = references(reference, wise, store, options, measure=not dry_run)
    check(Training(source, store, options, wise, None, losses), after, output)
    if dry_run:
        _print_plan(source, after, options, store.length, wise if distil else None, as_json)
        return
    world = join(device)
    tell_device(world, options, device)
    try:
        with progress_of(world) as progress:
            learned = run(
                source, after, store, options, output, teacher=wise if distil else None,
                reference=losses, world=world, progress=progress,
                notify=warn if world.first else lambda message: None,
            )  # fmt: skip
    finally:
        leave()
    if world.first:
        _print_result(learned, output, as_json)


def _print_plan(
    source: Checkpoint, after: Shape, options: LearnOptions, length: int,
    teacher: Checkpoint | None, as_json: bool,
) -> None:  # fmt: skip
    from shearling.gates.bank import lay_out
    from shearling.train.estimate import estimate

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    training = estimate(source, options, length, ranks=ranks, teacher=teacher)
    rows = lay_out(source.layout, source.shape, after)
    count = source.layout.count
    plan: dict[str, Any] = {
        "parameters": count(after), "source_parameters": count(source.shape),
        "gates": {r.axis: {"rows": r.rows, "units": r.units, "target": r.target} for r in rows},
        "training": training.as_json(),
    }  # fmt: skip
    if as_json:
        print(json.dumps(plan, indent=2))
        return
    print(
        f"{count(source.shape):,} -> {count(after):,} parameters; "
        + "; ".join(f"{r.axis}: {r.target} of {r.units} in each of {r.rows}" for r in rows)
    )
    print(training.as_text())


def _print_result(learned: Healed, output: Path, as_json: bool) -> None:
    from shearling.model.manifest import read_manifest

    if learned.model is None:
        text = (
            f"stopped at step {learned.step} of {learned.steps}; the same command goes on from it"
        )
        print(json.dumps({"step": learned.step, "steps": learned.steps}) if as_json else text)
        return
    manifest = read_manifest(output) or {}
    if as_json:
        print(json.dumps(manifest, indent=2, ensure_ascii=False))
        return
    print(
        f"{output}: {manifest['parameters']:,} parameters ({learned.model.shape}); go on with "
        f"`shearling heal {output}`"
    )
