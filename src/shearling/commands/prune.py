"""``shearling prune``: what the command line says, checked, and handed to :mod:`oneshot`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shearling.commands.options import (
    BY_HELP,
    Calibration,
    Json,
    Length,
    Model,
    ProtectFirst,
    ProtectLast,
    Samples,
    Seed,
    Stream,
    numbers,
    place_of,
    print_result,
    protection,
    warn,
    warn_ignored,
)
from shearling.errors import ShearlingError
from shearling.scoring.registry import criteria_for, default_for, kinds

if TYPE_CHECKING:
    from shearling.model.checkpoint import Checkpoint
    from shearling.pruning.run import Wanted
    from shearling.repair.calibration import Calibration as Text
    from shearling.scoring.scores import Scores
    from shearling.table.values import Keep, Shape


NewModel = Annotated[Path, typer.Option(help="A new directory for the smaller model.")]
Sizes = Annotated[
    str | None,
    typer.Option(
        help="Sizes after the cut, such as layers=24,mlp=1024; keys are layers, hidden, "
        "heads, kv_heads, mlp and vocab, and what is not named stays."
    ),
]
Params = Annotated[
    str | None,
    typer.Option(help="Parameters of the result, such as 0.8x or 113M; we choose the shape."),
]
Layers = Annotated[int | None, typer.Option(help="Blocks to keep; as --shape layers=N.")]
Remove = Annotated[str | None, typer.Option(help="Blocks to remove, separated by commas, from 0.")]
_DEFAULT = f"Default {default_for('blocks', repaired=True)},{default_for('units')}."
By = Annotated[str | None, typer.Option(help=f"{BY_HELP} {_DEFAULT}")]
OfBlocks = Annotated[Path | None, typer.Option(help="Scores of blocks from `shearling score`.")]
Refit = Annotated[
    bool | None,
    typer.Option(
        "--refit/--no-refit",
        help="Solve the matrices that write into the residual stream anew after the cut; "
        "by default whenever there is calibration text.",
    ),
]
Rotate = Annotated[
    bool | None,
    typer.Option(
        "--rotate/--no-rotate",
        help="Turn the residual stream into its principal axes before hidden is cut; by "
        "default where the architecture allows it and there is calibration text.",
    ),
]
Copies = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=9,
        help="Copies of the calibration text for the repair, in which the source model "
        "rewrote some of the tokens; by default one, or three if the model is streamed.",
    ),
]
Written = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Sequences for the repair that the source model writes itself; by default four for "
        "each of --samples. A streamed model writes none.",
    ),
]
ShardSize = Annotated[
    float, typer.Option(min=0.001, help="Largest weight file, in GB (10^9 bytes).")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")
]


def prune(
    model: Model,
    output: NewModel,
    shape: Sizes = None,
    params: Params = None,
    layers: Layers = None,
    remove: Remove = None,
    by: By = None,
    scores: OfBlocks = None,
    refit: Refit = None,
    rotate: Rotate = None,
    calibration: Calibration = None,
    samples: Samples = 64,
    length: Length = 256,
    copies: Copies = None,
    written: Written = None,
    seed: Seed = 0,
    stream: Stream = None,
    protect_first: ProtectFirst = None,
    protect_last: ProtectLast = None,
    shard_size: ShardSize = 1.0,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Cut a model to a shape or a size, repair it, and prove that it is what it claims."""
    from shearling.files.terminal import progress_bars
    from shearling.files.writer import check_output
    from shearling.model.checkpoint import Checkpoint
    from shearling.pruning.run import Run, repair_need
    from shearling.repair.calibration import Calibration as Text

    _require_one_size(shape, params, layers, remove, by, scores)
    check_output(output)
    source = Checkpoint.open(model)
    text, place = None, place_of(source, stream)
    if calibration is not None:
        asked = Text(calibration, samples, length, seed, _shares(1), written)
        place = place_of(source, stream, repair_need(source, asked))
        shares, written = _own_text(place.weights == "resident", copies, written)
        text = replace(asked, shares=shares, written=written)
    repaired = _repaired(refit, text)
    after = _shape(source, shape, params, layers, remove)
    rotated = _rotated(rotate, source, after, text)
    _warn_unused(source, after, by, scores, protect_first, protect_last, rotated=rotated)
    if dry_run and not (remove or scores or (by and text)):
        _print_plan(source, after, {}, as_json)
        return
    with progress_bars() as progress:
        run = Run(source, text, place=place, progress=progress)
        wanted = _wanted(
            source, after, by=by, scores=scores, remove=remove, repaired=repaired,
            rotated=rotated, protect=(protect_first, protect_last),
        )  # fmt: skip
        choice = run.choose(wanted)
        if not dry_run:
            run.write(choice, output, repaired=repaired, shard_bytes=int(shard_size * 1e9))
    if dry_run:
        _print_plan(source, after, dict(choice.options), as_json)
    else:
        _print_result(source, output, as_json)


def _require_one_size(
    shape: str | None, params: str | None, layers: int | None, remove: str | None,
    by: str | None, scores: Path | None,
) -> None:  # fmt: skip
    """Exactly one way to say how much goes, and at most one to say which blocks."""
    sizes = {"--shape": shape, "--params": params, "--layers": layers, "--remove": remove}
    given = [name for name, value in sizes.items() if value is not None]
    if not given:
        raise ShearlingError(
            "nothing says how much to cut; give --params 0.8x, --shape layers=24,mlp=1024, "
            "--layers N or --remove 14,15."
        )
    if remove is not None and (by is not None or scores is not None or len(given) > 1):
        raise ShearlingError(
            "--remove names the blocks itself; leave out --layers, --by and --scores, "
            "--shape and --params."
        )
    if len(given) > 1:
        raise ShearlingError(f"{' and '.join(given)} were both given; choose one.")
    if by is not None and scores is not None:
        raise ShearlingError("--by and --scores were both given; choose one.")


def _own_text(
    resident: bool, copies: int | None, written: int | None
) -> tuple[tuple[float, ...], int | None]:
    """Shares to rewrite and sequences to write; a streamed model writes none, and rewrites more."""
    if resident:
        return _shares(1 if copies is None else copies), written
    warn_ignored({"--written": written or None}, "a streamed model writes no text")
    return _shares(3 if copies is None else copies), 0


def _shares(copies: int) -> tuple[float, ...]:
    """Shares of tokens rewritten in each copy, spread evenly: 0.3, 0.5 and 0.7 for three."""
    if copies < 2:
        return (0.5,) * copies
    return tuple(round(0.3 + 0.4 * i / (copies - 1), 3) for i in range(copies))


def _repaired(refit: bool | None, text: Text | None) -> bool:
    """Whether to repair: as the user says, or else wherever there is text enough."""
    from shearling.repair.refit import HELD_OUT

    if refit is False or (refit is None and text is None):
        return False
    if text is None:
        raise ShearlingError(
            "--refit runs the model on text; give --calibration FILE as well, or --no-refit."
        )
    if text.samples >= HELD_OUT:
        return True
    if refit:
        raise ShearlingError(
            f"--refit was given with --samples {text.samples}, but a repair needs at least "
            f"{HELD_OUT} to choose how strong it should be; raise --samples, or use --no-refit."
        )
    warn(
        f"the repair is left out, as it needs at least {HELD_OUT} calibration sequences and "
        f"--samples is {text.samples}."
    )
    return False


def _rotated(rotate: bool | None, source: Checkpoint, after: Shape, text: Text | None) -> bool:
    """Whether to rotate the stream: as the user says, or else wherever it is possible."""
    from shearling.repair.rotate import refusal, require_rotatable

    if after["hidden"] == source.shape["hidden"]:
        warn_ignored({"--rotate" if rotate else "--no-rotate": rotate}, "hidden stays")
        return False
    if rotate:
        require_rotatable(source)
        if text is None:
            raise ShearlingError(
                "--rotate takes the stream's axes from text; give --calibration FILE as well, or "
                "--no-rotate."
            )
        return True
    if rotate is None and text is not None:
        reason = refusal(source)
        if reason is None:
            return True
        warn(f"channels are cut as they are, without a rotation, because {reason}.")
    return False


def _warn_unused(
    source: Checkpoint, after: Shape, by: str | None, scores: Path | None, first: int | None,
    last: int | None, *, rotated: bool,
) -> None:  # fmt: skip
    """Refuse criteria that are unknown or too many; say which options speak of what is not cut."""
    criteria_for(by, source, repaired=False)
    shrunk = {axis for axis in after if after[axis] < source.shape[axis]}
    cut = {"blocks"} if "layers" in shrunk else set()
    chosen_by_none = {"layers", "vocab", *(["hidden"] if rotated else [])}
    cut |= {"units"} if shrunk - chosen_by_none else set()
    for name in (part.strip() for part in by.split(",")) if by is not None else ():
        if cut.isdisjoint(kinds(name)):
            warn_ignored({f"--by {name}": name}, f"no {kinds(name)[0]} are to be chosen")
    if "layers" not in shrunk:
        given = {"--scores": scores, "--protect-first": first, "--protect-last": last}
        warn_ignored(given, "all blocks stay")


def _shape(
    source: Checkpoint, shape: str | None, params: str | None, layers: int | None,
    remove: str | None,
) -> Shape:  # fmt: skip
    from shearling.pruning.choose import without
    from shearling.pruning.plan import parse_layers, parse_params, parse_shape, shape_for

    if shape is not None:
        return parse_shape(shape, source)
    if params is not None:
        return shape_for(source, parse_params(params, source.parameters))
    if remove is not None:
        keep = without(numbers(remove, "--remove"), source.shape["layers"])
        return source.shape.with_(layers=len(keep.model["layers"]))
    assert layers is not None
    return parse_layers(layers, source)


def _wanted(
    source: Checkpoint, after: Shape, *, by: str | None, scores: Path | None, remove: str | None,
    repaired: bool, rotated: bool, protect: tuple[int | None, int | None],
) -> Wanted:  # fmt: skip
    from shearling.pruning.choose import without
    from shearling.pruning.run import Wanted

    keep: Keep | None = None
    if remove is not None:
        keep = without(numbers(remove, "--remove"), source.shape["layers"])
    if (scores is not None or remove is not None) and after["layers"] < source.shape["layers"]:
        ignored = dict(zip(("--protect-first", "--protect-last"), protect, strict=True))
        warn_ignored(ignored, "the blocks are already chosen")
    criterion, _ = criteria_for(by, source, repaired=repaired)
    return Wanted(
        after, by=by, scores=None if scores is None else load_scores(scores, source),
        keep_blocks=keep, repaired=repaired, rotated=rotated,
        protect=protection(criterion, *protect),
    )  # fmt: skip


def load_scores(file: Path, source: Checkpoint) -> Scores:
    """Scores of blocks from a file, with a warning if they were taken on another model."""
    from shearling.scoring.scores import Scores

    scores = Scores.load(file)
    if scores.axis != "layers":
        raise ShearlingError(
            f"{file} scores units of {scores.axis}, but --scores takes scores of layers; make them "
            "with: shearling score MODEL --calibration FILE --output scores.json."
        )
    scores.require(source.layout, source.shape, file=file)
    scored = scores.details.get("model") or {}
    if scored.get("fingerprint") not in (None, source.fingerprint):
        warn(
            f"{file} scores {scored.get('name')}, whose weights or configuration differ from "
            f"those of {source.name}."
        )
    return scores


def _print_plan(source: Checkpoint, after: Shape, options: dict[str, Any], as_json: bool) -> None:
    from shearling.model.inspect import comparison

    plan = comparison(source, after)
    removed = options.get("removed")
    text = [f"would remove blocks {', '.join(map(str, removed))}"] if removed else []
    text += [*_widths(source.shape, after), *plan["text"]]
    notes = source.family.notes(source.config, after)
    print_result(options | plan["figures"] | {"notes": notes}, as_json, [*text, *notes])


def _print_result(source: Checkpoint, output: Path, as_json: bool) -> None:
    from shearling.model.inspect import comparison
    from shearling.model.manifest import read_manifest
    from shearling.table.values import Shape

    manifest = read_manifest(output) or {}
    options, proof = manifest["options"], manifest["proof"]
    after = Shape(manifest["shape"])
    text = [f"removed blocks {options['removed']}"] if options.get("removed") else []
    text += [*_widths(source.shape, after), *comparison(source, after)["text"]]
    turned = options.get("rotation")
    if turned:
        text.append(
            f"rotated     into the principal axes: {turned['kept_energy']:.1%} of the stream's "
            f"energy stays; logits within {turned['proof']['max_relative_difference']:.1e} of the "
            "source before the cut"
        )
    mended = options.get("repair")
    if mended:
        for line in mended["warnings"]:
            warn(line)
        before = sum(step["error_before"] for step in mended["steps"])
        gone = 1 - sum(step["error_after"] for step in mended["steps"]) / max(before, 1e-300)
        text.append(
            f"repaired    {len(manifest.get('repaired', []))} tensors on {mended['tokens']:,} "
            f"tokens in {mended['seconds']:.0f} s: {gone:.0%} of the held-out error gone"
        )
    else:
        text.append("not repaired: --calibration FILE and --refit would solve what is left anew")
    text.append(
        f"proof of surgery: logits within {proof['max_relative_difference']:.1e} of the source "
        f"with what was removed masked ({proof['loaded_with']})"
    )
    text += source.family.notes(source.config, after)
    print_result(manifest, as_json, [*text, f"wrote {output}"])


def _widths(before: Shape, after: Shape) -> list[str]:
    """Every axis that shrinks, but for the blocks, which are told apart."""
    changed = [axis for axis in after if axis != "layers" and after[axis] < before[axis]]
    return [f"{axis:<11} {before[axis]} -> {after[axis]}" for axis in changed]
