"""``shearling reference``: losses that dynamic batch loading steers by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shearling.commands.options import (
    Bos,
    Json,
    MergeAdapter,
    PlaceOptions,
    check_file,
    place_of,
    print_result,
    warn,
    warn_ignored,
    with_adapter,
)
from shearling.commands.takes import takes_options
from shearling.errors import ShearlingError

if TYPE_CHECKING:
    from shearling.data.store import Store
    from shearling.engine.ranks import Ranks
    from shearling.model.checkpoint import Checkpoint
    from shearling.train.reference import Point, Reference


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions:
    """What the command line says."""

    output: Annotated[Path, typer.Option(help="A .json file for the losses.")]
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Models to measure: the source model alone, or several of its family."),
    ] = None
    merge_adapter: MergeAdapter = False
    store: Annotated[
        Path | None, typer.Option(help="The token store whose held-out parts are measured.")
    ] = None
    target_params: Annotated[
        str | None,
        typer.Option(
            help="With several models: the size to predict for, such as 113M, or 0.8x of the first."
        ),
    ] = None
    losses: Annotated[
        list[Path] | None,
        typer.Option(help="Losses of one model measured before; may be repeated."),
    ] = None
    given: Annotated[
        str | None,
        typer.Option(help="Losses as they are: domain=loss,… or a JSON file of such."),
    ] = None
    sequences: Annotated[
        int | None, typer.Option(min=1, help="Held-out sequences of each domain. Default 500.")
    ] = None
    bos: Bos = None
    place: PlaceOptions
    as_json: Json = False


@takes_options
def reference(options: ReferenceOptions) -> None:
    """Find the loss that each domain should come down to while a smaller model is healed.

    One model's own losses; or what a scaling law, fitted to those of several models of a family,
    predicts at --target-params; or losses that are given.
    """
    check_file(options.output)
    with options.place.joined() as ranks:
        given = options.given is not None
        reference = _read_given(options) if given else _fitted(options, ranks)
    if ranks.first:
        reference.save(options.output)
    for sentence in reference.how.get("warnings", []):
        warn(f"{sentence}.")
    lines = [*_lines(reference), f"wrote {options.output}"]
    print_result(reference.to_json(), options.as_json, lines)


def _read_given(options: ReferenceOptions) -> Reference:
    """Losses that the command line or a file says."""
    from shearling.data.store import Store
    from shearling.train.reference import given

    assert options.given is not None
    _refuse_both(options.models or [], options.losses or [])
    idle = {
        "--target-params": options.target_params,
        "--sequences": options.sequences,
        **options.place.given,
    }
    warn_ignored(idle, "the losses are given")
    reference = given(options.given)
    if options.store is not None:
        _check_domains(reference, Store.open(options.store))
    return reference


def _refuse_both(models: list[str], losses: list[Path]) -> None:
    if models or losses:
        what = "models" if models else "--losses"
        raise ShearlingError(f"--given and {what} were both given; choose one.")


def _check_domains(reference: Reference, store: Store) -> None:
    if set(reference.losses) != set(store.domains):
        raise ShearlingError(
            f"--given names {', '.join(sorted(reference.losses))}, but the domains of {store.path} "
            f"are {', '.join(store.domains)}; give one loss for each."
        )


def _open_store(store: Path | None, models: list[str], losses: list[Path]) -> Store | None:
    from shearling.data.store import Store

    if not (models or losses):
        raise ShearlingError(
            "nothing says where the losses come from; name a MODEL and --store, several models "
            "and --target-params, or --given domain=loss,…"
        )
    if models and store is None:
        raise ShearlingError(
            f"{models[0]} was named, but there is no text to measure it on; give --store STORE."
        )
    if not models and store is not None:
        warn_ignored({"--store": store}, "no model is to be measured")
        return None
    return None if store is None else Store.open(store)


def _fitted(options: ReferenceOptions, ranks: Ranks) -> Reference:
    """Measure what is to be measured, and fit a law if there are losses of several models."""
    from shearling.model.checkpoint import Checkpoint
    from shearling.train.reference import Point, predict

    models, files = options.models or [], options.losses or []
    store = _open_store(options.store, models, files)
    checkpoints = [Checkpoint.open(with_adapter(model, options.merge_adapter)) for model in models]
    before = [Point.load(file) for file in files]
    sizes = [model.parameters for model in checkpoints] + [point.parameters for point in before]
    target = _target(sizes, options.target_params, len(checkpoints))
    if not checkpoints:
        idle = {"--sequences": options.sequences} | options.place.given
        warn_ignored(idle, "no model is to be measured")
    elif store is not None:  # all is checked before any model is run
        _check_models(checkpoints, store, before, options.bos)
    measured = []
    for number, checkpoint in enumerate(checkpoints, 1):
        assert store is not None
        measured.append(_measured(checkpoint, store, options.sequences, options.place, ranks))
        if (
            target is not None and ranks.first
        ):  # kept, so that no law that fails to fit costs the measuring again
            output = options.output
            measured[-1].save(output.with_name(f"{output.stem}-{number}-{checkpoint.name}.json"))
    if target is None:
        return measured[0]
    return predict([*map(_point, measured), *before], target)


def _check_models(
    checkpoints: list[Checkpoint], store: Store, before: list[Point], bos: bool | None
) -> None:
    """Refuse models of another tokenizer, and losses that no law can join."""
    from shearling.train.reference import Point, check_points

    for checkpoint in checkpoints:
        store.check_tokenizer(checkpoint.path, bos)
    unknown = dict.fromkeys(store.domains, math.nan)
    coming = [Point(c.name, c.parameters, unknown, store.tokenizer) for c in checkpoints]
    check_points([*coming, *before])


def _target(sizes: list[int], target_params: str | None, models: int) -> int | None:
    """Parameters to predict for; None where one model's own losses are the answer."""
    from shearling.pruning.plan import parse_params

    if len(sizes) == 1 and models == 1:
        warn_ignored({"--target-params": target_params}, "a law needs losses of several models")
        return None
    if len(set(sizes)) < 2:
        raise ShearlingError(
            f"losses of models of one size ({sizes[0]:,} parameters) were named, but a law needs "
            "two sizes or better three; name further models of the family."
        )
    if target_params is None:
        raise ShearlingError(
            f"{len(sizes)} models were named, but not the size to predict for; give "
            "--target-params 0.8x or 113M, or name the source model alone."
        )
    try:
        return parse_params(target_params, sizes[0])
    except ShearlingError as error:
        raise ShearlingError(str(error).replace("--params", "--target-params")) from None


def _measured(
    checkpoint: Checkpoint,
    store: Store,
    sequences: int | None,
    options: PlaceOptions,
    ranks: Ranks,
) -> Reference:
    from shearling.files.terminal import progress_bars
    from shearling.train.reference import SEQUENCES, measured

    place = place_of(checkpoint, options, ranks)
    with progress_bars() as progress:
        return measured(checkpoint, store, sequences or SEQUENCES, place=place, progress=progress)


def _point(reference: Reference) -> Point:
    from shearling.train.reference import Point

    how = reference.how
    return Point(
        how["model"]["name"], how["parameters"], reference.losses, how["store"]["tokenizer"]
    )


def _lines(reference: Reference) -> list[str]:
    """The losses for a person."""
    how: dict[str, Any] = reference.how
    wide = max(len(domain) for domain in reference.losses)
    if how["method"] == "measured":
        head = f"losses of {how['model']['name']}, {how['parameters']:,} parameters"
    elif how["method"] == "law":
        head = f"losses predicted at {how['target_parameters']:,} parameters"
    else:
        head = "losses as given"
    lines = [f"{head} (nats per token):"]
    for domain, loss in reference.losses.items():
        line = f"  {domain:{wide}}  {loss:.4f}"
        if how["method"] == "law":
            law = how["laws"][domain]
            error = max(map(abs, law["relative_errors"]))
            line += (
                f"  = {law['a']:.4g} * N^-{law['b']:.4g} + {law['c']:.4g}, "
                f"off by at most {error:.2%}"
            )
        lines.append(line)
    return lines
