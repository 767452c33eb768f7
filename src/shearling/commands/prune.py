"""``shearling prune``: what the command line says, handed to :mod:`shearling.pruning.prune`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shearling.commands.options import (
    BY_HELP,
    Json,
    ModelOptions,
    PlaceOptions,
    ProtectOptions,
    Seed,
    TextOptions,
    note,
    numbers,
    print_result,
    warn,
)
from shearling.commands.takes import takes_options
from shearling.scoring.registry import KINDS, default_for

if TYPE_CHECKING:
    from shearling.engine.ranks import Ranks
    from shearling.model.checkpoint import Checkpoint
    from shearling.pruning.prune import CalibrationText, Pruning
    from shearling.table.values import Shape


NewModel = Annotated[Path, typer.Option(help="A new directory for the smaller model.")]
Sizes = Annotated[
    str | None,
    typer.Option(
        help="Sizes after the cut, such as layers=24,mlp=1024; keys are layers, hidden, heads, "
        "kv_heads, linear_heads, mlp, experts, expert_mlp (of one expert) and vocab; what is not "
        "named stays."
    ),
]
Params = Annotated[
    str | None,
    typer.Option(help="Parameters of the result, such as 0.8x or 113M; we choose the shape."),
]
ActiveParams = Annotated[
    str | None,
    typer.Option(help="Of a mixture of experts: parameters that one token meets; as --params."),
]
Layers = Annotated[int | None, typer.Option(help="Blocks to keep; as --shape layers=N.")]
Remove = Annotated[str | None, typer.Option(help="Blocks to remove, separated by commas, from 0.")]
_DEFAULT = f"Default {','.join(default_for(of, repaired=True) for of in KINDS)}."
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
FinalNorm = Annotated[
    bool | None,
    typer.Option(
        "--final-norm/--no-final-norm",
        help="Fit the final norm's gain after the repair, so that what the cut says is nearest to "
        "what the source does; by default with every repair.",
    ),
]
MoveRouter = Annotated[
    bool,
    typer.Option(
        "--router",
        help="Let the rows of a mixture's router move in the repair as well, where held-out text "
        "gains by that.",
    ),
]
MergeExperts = Annotated[
    bool,
    typer.Option(
        "--merge-experts",
        help="Fold experts that go into those that stay and are most like them, before the "
        "repair; on the mixture that we measured, leaving them out was better.",
    ),
]
KeepPattern = Annotated[
    bool,
    typer.Option(
        "--keep-pattern",
        help="Remove only blocks that leave the others of the kind (sliding or full attention) "
        "that llama.cpp takes them for by their number; without, a Gemma may not export to GGUF.",
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


@dataclass(frozen=True, kw_only=True)
class SizeOptions:
    """How much goes."""

    shape: Sizes = None
    params: Params = None
    active_params: ActiveParams = None
    layers: Layers = None
    remove: Remove = None


@dataclass(frozen=True, kw_only=True)
class ModelTextOptions:
    """What the source model makes of the calibration text."""

    copies: Copies = None
    written: Written = None


@dataclass(frozen=True, kw_only=True)
class RepairOptions:
    """What is mended."""

    refit: Refit = None
    rotate: Rotate = None
    final_norm: FinalNorm = None
    router: MoveRouter = False
    merge_experts: MergeExperts = False


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """What the command line says."""

    model: ModelOptions
    output: NewModel
    size: SizeOptions
    by: By = None
    scores: OfBlocks = None
    repair: RepairOptions
    text: TextOptions
    model_text: ModelTextOptions
    seed: Seed = 0
    place: PlaceOptions
    protect: ProtectOptions
    keep_pattern: KeepPattern = False
    shard_size: ShardSize = 1.0
    dry_run: DryRun = False
    as_json: Json = False


@takes_options
def prune(options: PruneOptions) -> None:
    """Cut a model to a shape or a size, repair it, and prove that it is what it claims."""
    with options.place.joined() as ranks:
        _run(options, ranks)


def _run(options: PruneOptions, ranks: Ranks) -> None:
    from shearling.files.terminal import progress_bars
    from shearling.files.writer import claimed
    from shearling.pruning.settle import tell_pattern

    pruning = _pruning(options, ranks)
    wanted = pruning.wanted
    chosen_by_text = options.by is not None and pruning.calibration is not None
    named = wanted.keep_blocks is not None or wanted.scores is not None
    if options.dry_run and not (named or chosen_by_text):
        _print_plan(pruning, {}, options)
        return
    writes = ranks.first and not options.dry_run
    alone = claimed(options.output) if writes else nullcontext()
    with alone, progress_bars() as progress:
        run = pruning.run(progress, note)
        choice = run.choose(wanted)
        if ranks.first:
            tell_pattern(pruning.source, choice.keep, warn)
        if not options.dry_run:
            shard_bytes = int(options.shard_size * 1e9)
            run.write(choice, options.output, repaired=wanted.repaired, shard_bytes=shard_bytes)
    if options.dry_run:
        _print_plan(pruning, dict(choice.options), options)
    elif ranks.first:
        _print_result(pruning.source, options.output, options.as_json)


def _pruning(options: PruneOptions, ranks: Ranks) -> Pruning:
    """What is asked for, checked; the model is opened, and none of its weights read."""
    from shearling.files.writer import check_output
    from shearling.model.checkpoint import Checkpoint
    from shearling.pruning.prune import Criteria, Pruning, Repairs, Running, Size

    given, protect, mend = options.size, options.protect, options.repair
    size = Size(
        shape=given.shape,
        params=given.params,
        active_params=given.active_params,
        layers=given.layers,
        remove=None if given.remove is None else tuple(numbers(given.remove, "--remove")),
    )
    criteria = Criteria(
        by=options.by,
        scores=options.scores,
        protect_first=protect.protect_first,
        protect_last=protect.protect_last,
        keep_pattern=options.keep_pattern,
    )
    check_output(options.output)
    return Pruning.of(
        Checkpoint.open(options.model.given()),
        size,
        calibration=_calibration(options),
        criteria=criteria,
        repairs=Repairs(
            refit=mend.refit,
            rotate=mend.rotate,
            final_norm=mend.final_norm,
            router=mend.router,
            merge_experts=mend.merge_experts,
        ),
        running=Running(wish=options.place.wish(ranks), notify=warn),
    )


def _calibration(options: PruneOptions) -> CalibrationText | None:
    from shearling.pruning.prune import CalibrationText

    given, made = options.text, options.model_text
    if given.calibration is None:
        return None
    return CalibrationText(
        file=given.calibration, samples=given.samples, length=given.length, seed=options.seed,
        copies=made.copies, written=made.written, bos=given.bos,
    )  # fmt: skip


def _print_plan(pruning: Pruning, how: dict[str, Any], options: PruneOptions) -> None:
    """What would be written; ``how`` the blocks that go were chosen, if they are known."""
    from shearling.model.inspect import comparison

    source, after = pruning.source, pruning.wanted.after
    removed = how.get("removed")
    gone = set(removed or ())
    kept = [block for block in range(source.shape["layers"]) if block not in gone]
    plan = comparison(source, after, kept if gone else None)
    text = [f"would remove blocks {', '.join(map(str, removed))}"] if removed else []
    text += [*_widths(source.shape, after), *plan["text"]]
    notes = source.notes(after)
    text += [*notes, *pruning.place.lines()]
    print_result(how | plan["figures"] | {"notes": notes}, options.as_json, text)


def _print_result(source: Checkpoint, output: Path, as_json: bool) -> None:
    from shearling.model.inspect import comparison
    from shearling.model.manifest import read_manifest
    from shearling.table.values import Shape

    manifest = read_manifest(output) or {}
    options, proof = manifest["options"], manifest["proof"]
    after = Shape(manifest["shape"])
    text = [f"removed blocks {options['removed']}"] if options.get("removed") else []
    compared = comparison(source, after, manifest["keep"].get("layers"))
    text += [*_widths(source.shape, after), *compared["text"]]
    text += _rotation_lines(options.get("rotation"))
    text.append(_repair_line(options.get("repair"), len(manifest.get("repaired", []))))
    text.append(
        f"proof of surgery: logits within {proof['max_relative_difference']:.1e} of the source "
        f"with what was removed masked ({proof['loaded_with']})"
    )
    text += source.notes(after)
    print_result(manifest, as_json, [*text, f"wrote {output}"])


def _rotation_lines(rotation: dict[str, Any] | None) -> list[str]:
    if not rotation:
        return []
    return [
        f"rotated     into the principal axes: {rotation['kept_energy']:.1%} of the stream's "
        f"energy stays; logits within {rotation['proof']['max_relative_difference']:.1e} of the "
        "source before the cut"
    ]


def _repair_line(repair: dict[str, Any] | None, tensors: int) -> str:
    """What the repair did; its warnings go to stderr."""
    if not repair:
        return "not repaired: --calibration FILE and --refit would solve what is left anew"
    for sentence in repair["warnings"]:
        warn(sentence)
    before = sum(step["error_before"] for step in repair["steps"])
    gone = 1 - sum(step["error_after"] for step in repair["steps"]) / max(before, 1e-300)
    left = "" if repair["final_norm"] else "; the final norm as it was (--no-final-norm)"
    return (
        f"repaired    {tensors} tensors on {repair['tokens']:,} tokens in "
        f"{repair['seconds']:.0f} s: {gone:.0%} of the held-out error gone{left}"
    )


def _widths(before: Shape, after: Shape) -> list[str]:
    """Every axis that shrinks, but for the blocks, which are told apart."""
    changed = [axis for axis in after if axis != "layers" and after[axis] < before[axis]]
    return [f"{axis:<11} {before[axis]} -> {after[axis]}" for axis in changed]
