"""``shearling prune``: what the command line says, handed to :mod:`shearling.pruning.prune`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
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
    print_result,
    warn,
)
from shearling.commands.prune_lines import family_lines, plan_of, print_pruned
from shearling.commands.size_options import SizeOptions, sizes_of
from shearling.commands.takes import takes_options
from shearling.commands.target_options import TargetOptions, met, slight_cut, tell_preference
from shearling.scoring.registry import KINDS, default_for

if TYPE_CHECKING:
    from shearling.engine.ranks import Ranks
    from shearling.model.checkpoint import Checkpoint
    from shearling.pruning.family import FamilyPruning
    from shearling.pruning.prune import Pruning
    from shearling.pruning.size import Size
    from shearling.pruning.text import CalibrationText


NewModel = Annotated[
    Path,
    typer.Option(
        help="A new directory for the smaller model; of several sizes, the directory that gets one "
        "for each."
    ),
]
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
WrittenFrom = Annotated[
    str,
    typer.Option(
        help="What those sequences begin with: a few tokens of the text, the chat template behind "
        "a user's turn (template), or half of them each (both).",
    ),
]
ShardSize = Annotated[
    float, typer.Option(min=0.001, help="Largest weight file, in GB (10^9 bytes).")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")
]


@dataclass(frozen=True, kw_only=True)
class ModelTextOptions:
    """What the source model makes of the calibration text."""

    copies: Copies = None
    written: Written = None
    written_from: WrittenFrom = "text"


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
    target: TargetOptions
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
    from shearling.files.writer import check_output, check_outside

    sizes = sizes_of(options.size, options.target)
    if len(sizes) > 1 or options.size.nested:
        _run_family(options, sizes, ranks)
        return
    from shearling.pruning.prune import Pruning

    check_output(options.output)
    source = _source(options)
    check_outside(options.output, source.path)
    size = sizes[0] if sizes else _met(source, options, ranks)
    pruning = Pruning.of(source, size, **_asked(options, ranks))
    _run_one(options, pruning, ranks)


def _tell_preference(options: PruneOptions, pruning: Pruning, name: str = "") -> None:
    given = options.size
    if options.target.asked or given.params or given.active_params:
        tell_preference(options.target, pruning.source, pruning.wanted.after, name)


def _run_one(options: PruneOptions, pruning: Pruning, ranks: Ranks) -> None:
    from shearling.files.terminal import progress_bars
    from shearling.files.writer import claimed
    from shearling.pruning.settle import tell_pattern

    wanted = pruning.wanted
    chosen_by_text = options.by is not None and pruning.calibration is not None
    named = wanted.keep_blocks is not None or wanted.scores is not None
    if options.dry_run and not (named or chosen_by_text):
        pruning.check()
        _tell_preference(options, pruning)
        _print_plan(pruning, {}, options)
        return
    writes = ranks.first and not options.dry_run
    alone = claimed(options.output) if writes else nullcontext()
    with alone, progress_bars() as progress:
        run = pruning.run(progress, note)
        choice = run.choose(wanted)
        _tell_preference(options, pruning)
        if ranks.first:
            tell_pattern(pruning.source, choice.keep, warn)
        if not options.dry_run:
            shard_bytes = int(options.shard_size * 1e9)
            run.write(choice, options.output, repaired=wanted.repaired, shard_bytes=shard_bytes)
    if options.dry_run:
        _print_plan(pruning, dict(choice.options), options)
    elif ranks.first:
        print_pruned(pruning.source, options.output, options.as_json)


def _run_family(options: PruneOptions, sizes: list[Size], ranks: Ranks) -> None:
    """Several sizes at once, each in a directory of its own."""
    from shearling.files.terminal import progress_bars
    from shearling.pruning.family import FamilyPruning
    from shearling.pruning.prune import Running
    from shearling.report import write_report

    source = _source(options)
    family = FamilyPruning.of(
        source, options.output, sizes, nested=options.size.nested, **_asked(options, ranks)
    )
    missing = family.missing()
    if options.dry_run:
        family.check()
        _tell_preferences(options, family)
        _print_plans(family, [member.name for member in missing], options.as_json)
        return
    for member in family.members:
        if member not in missing:
            note(f"{member.output} is there already, of the same inputs, and is kept.")
    running = Running(notify=warn, shard_bytes=int(options.shard_size * 1e9))
    with progress_bars() as progress:
        made = family.write(progress, running=running, tell=note)
    _tell_preferences(options, family)
    if ranks.first:
        page = write_report([options.output], options.output / "report.html")
        lines = [*family_lines(made), f"wrote {options.output} and {page}"]
        print_result(made.to_json(), options.as_json, lines)


def _tell_preferences(options: PruneOptions, family: FamilyPruning) -> None:
    for member in family.members:
        _tell_preference(options, member.pruning, f"{member.name}: ")


def _source(options: PruneOptions) -> Checkpoint:
    from shearling.model.checkpoint import Checkpoint

    return Checkpoint.open(options.model.given())


def _met(source: Checkpoint, options: PruneOptions, ranks: Ranks) -> Size:
    """The size that meets targets, which is searched for once all else is known to be possible."""
    budget = {"params": options.size.params, "active_params": options.size.active_params}
    check = partial(_check_slight, source, options, ranks)
    return met(source, budget, options.target, options.place, ranks, options.text, check)


def _check_slight(source: Checkpoint, options: PruneOptions, ranks: Ranks) -> None:
    """Refuse what would be refused of a cut of any size (ShearlingError)."""
    from shearling.pruning.prune import Pruning, Running
    from shearling.pruning.size import Size
    from shearling.scoring.registry import criteria_for

    asked = _asked(options, ranks)
    criteria_for(options.by, source, repaired=asked["calibration"] is not None)
    slight = slight_cut(source, options.target)
    if slight == source.shape:
        return
    silent = Running(wish=options.place.wish(ranks), notify=lambda sentence: None)
    criteria = replace(asked["criteria"], keep_pattern=False)  # of another depth
    changed = {axis: size for axis, size in slight.items() if size != source.shape[axis]}
    asked |= {"criteria": criteria, "running": silent}
    Pruning.of(source, Size(shape=changed), **asked).check()


def _asked(options: PruneOptions, ranks: Ranks) -> dict[str, Any]:
    """All that is asked for but the size, by argument of :func:`shearling.pruning.prune.prune`."""
    from shearling.pruning.prune import Criteria, Repairs, Running

    protect, mend = options.protect, options.repair
    return {
        "calibration": _calibration(options),
        "criteria": Criteria(
            by=options.by,
            scores=options.scores,
            protect_first=protect.protect_first,
            protect_last=protect.protect_last,
            keep_pattern=options.keep_pattern,
        ),
        "repairs": Repairs(
            refit=mend.refit,
            rotate=mend.rotate,
            final_norm=mend.final_norm,
            router=mend.router,
            merge_experts=mend.merge_experts,
        ),
        "running": Running(wish=options.place.wish(ranks), notify=warn),
    }


def _calibration(options: PruneOptions) -> CalibrationText | None:
    from shearling.pruning.text import CalibrationText
    from shearling.repair.openings import check_written_from

    given, made = options.text, options.model_text
    if (sources := given.sources) is None:
        return None
    return CalibrationText(
        sources=sources, samples=given.samples, length=given.length, seed=options.seed,
        copies=made.copies, written=made.written, bos=given.bos,
        written_from=check_written_from(made.written_from),
    )  # fmt: skip


def _print_plan(pruning: Pruning, how: dict[str, Any], options: PruneOptions) -> None:
    """What would be written; ``how`` the blocks that go were chosen, if they are known."""
    figures, text = plan_of(pruning, how)
    peak = pruning.peak()
    lines = [*text, *pruning.place.lines(), peak.line()]
    print_result(figures | {"memory": peak.as_json()}, options.as_json, lines)


def _print_plans(family: FamilyPruning, missing: list[str], as_json: bool) -> None:
    """The same of several sizes, those that are there already included."""
    plans: dict[str, Any] = {}
    text: list[str] = []
    for member in family.members:
        figures, lines = plan_of(member.pruning, {})
        made = "" if member.name in missing else " (there already)"
        plans[member.name] = figures | {"made": member.name not in missing}
        text += [f"{member.name}{made}", *(f"  {line}" for line in lines)]
    text += [*family.members[0].pruning.place.lines(), family.peak.line()]
    described = {"nested": family.nested, "sizes": plans, "memory": family.peak.as_json()}
    print_result(described, as_json, text)
