"""``shearling heal``: what the command line says, checked, and handed to :mod:`train.heal`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shearling.commands.options import (
    Device,
    Dtype,
    Json,
    Model,
    References,
    RunOutput,
    TokenStore,
    TrainingTokens,
    note,
    warn,
)
from shearling.errors import ShearlingError

if TYPE_CHECKING:
    from shearling.data.store import Store
    from shearling.model.checkpoint import Checkpoint
    from shearling.train.heal import Healed
    from shearling.train.options import Options
    from shearling.train.parallel import World


def heal(
    model: Model,
    data: TokenStore,
    tokens: TrainingTokens,
    output: RunOutput,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Options such as lr=1e-4 batch=16 mix=dynamic weights.c4=0.5.",
        ),
    ] = None,
    recipe: Annotated[str, typer.Option(help="cpt, lora, cpt-then-lora or distill.")] = "cpt",
    teacher: Annotated[
        str | None, typer.Option(help="The model to distil from, and to take references of.")
    ] = None,
    teacher_cache: Annotated[
        Path | None, typer.Option(help="What the teacher says, from `shearling teach`, instead.")
    ] = None,
    reference: References = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, and train nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Retrain a model on text or from its source; goes on by itself if it was stopped."""
    from shearling.data.store import Store
    from shearling.data.teacher import Cache
    from shearling.model.checkpoint import Checkpoint
    from shearling.pruning.plan import parse_count
    from shearling.train.heal import heal as run
    from shearling.train.options import parse
    from shearling.train.parallel import join, leave
    from shearling.train.setup import Training, check

    options = parse(recipe, parse_count(tokens, "--tokens"), with_dtype(settings, dtype))
    source, store = Checkpoint.open(model), Store.open(data)
    options = _inherited(options, source, store)
    wise = None if teacher is None else Checkpoint.open(teacher)
    cache = None if teacher_cache is None else Cache.open(teacher_cache)
    losses = references(reference, wise, store, options, measure=not dry_run)
    check(Training(source, store, options, wise, cache, losses), output)
    if dry_run:
        _print_estimate(source, store, options, None if cache else wise, as_json)
        return
    world = join(device)
    tell_device(world, options, device)
    try:
        with progress_of(world) as progress:
            healed = run(
                source, store, options, output, teacher=wise, cache=cache, reference=losses,
                world=world, progress=progress,
                notify=warn if world.first else lambda message: None,
            )  # fmt: skip
    finally:
        leave()
    if world.first:
        _print_result(healed, output, as_json)


def _inherited(options: Options, source: Checkpoint, store: Store) -> Options:
    """Weights that were not given go on from where the model's last training left them."""
    from shearling.model.lineage import final_weights

    if options.mix == "proportional" or options.weights is not None:
        return options
    weights = final_weights(source)
    if weights is None or set(weights) != set(store.domains):
        return options
    warn(f"the domains start with the weights that the training of {source.name} ended with.")
    return options.model_copy(update={"weights": weights})


def references(
    file: Path | None, teacher: Checkpoint | None, store: Store, options: Options, *, measure: bool
) -> dict[str, float] | None:
    """Reference losses for a dynamic mix: from a file, or measured on the teacher."""
    from shearling.train.reference import SEQUENCES, Reference
    from shearling.train.reference import measure as measured

    if options.mix != "dynamic":
        return None
    if file is not None:
        found = Reference.load(file)
        if found.tokenizer not in (None, store.tokenizer):
            raise ShearlingError(
                f"the losses of {file} were measured with another tokenizer than {store.path} was "
                "packed with; measure them on that store."
            )
        return found.losses
    if teacher is None:
        return None
    if not measure:
        return dict.fromkeys(store.domains, 0.0)
    return measured(teacher, store, min(SEQUENCES, options.eval_sequences))


def with_dtype(settings: list[str] | None, dtype: str) -> list[str]:
    """The ``key=value`` pairs, with ``--dtype`` among them where it says something."""
    return [*(settings or []), *([] if dtype == "auto" else [f"dtype={dtype}"])]


def tell_device(world: World, options: Options, asked: str) -> None:
    """Say where the first rank trains and in which numbers, and why."""
    from shearling.train.device import described

    if world.first:
        note(described(world.device, options.dtype, options.weight_dtype, asked))


def progress_of(world: World) -> Any:
    """Progress bars on the rank that speaks."""
    from contextlib import nullcontext

    from shearling.files.progress import silent
    from shearling.files.terminal import progress_bars

    return progress_bars() if world.first else nullcontext(silent)


def _print_estimate(
    source: Checkpoint, store: Store, options: Options, teacher: Checkpoint | None, as_json: bool
) -> None:
    from shearling.train.estimate import estimate

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    found = estimate(source, options, store.length, ranks=ranks, teacher=teacher)
    print(json.dumps(found.as_json(), indent=2) if as_json else found.as_text())


def _print_result(healed: Healed, output: Path, as_json: bool) -> None:
    from shearling.model.manifest import read_manifest

    if healed.model is None:
        text = f"stopped at step {healed.step} of {healed.steps}; the same command goes on from it"
        print(json.dumps({"step": healed.step, "steps": healed.steps}) if as_json else text)
        return
    manifest = read_manifest(output) or {}
    if as_json:
        print(json.dumps(manifest, indent=2, ensure_ascii=False))
        return
    losses = manifest["losses"]
    for domain in losses["after"]:
        before, after = losses["before"][domain], losses["after"][domain]
        print(f"{domain:<16} {before:.4f} -> {after:.4f} nats a token, held out")
    print(f"wrote {output}")
    sys.stdout.flush()
