"""``shearling score``: what the command line says, checked, and handed to the criteria."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shearling.commands.options import (
    BY_HELP,
    Json,
    ModelOptions,
    PlaceOptions,
    ProtectOptions,
    Seed,
    TextOptions,
    check_file,
    place_of,
    print_result,
    unit_lines,
    warn_ignored,
)
from shearling.commands.takes import takes_options
from shearling.errors import ShearlingError
from shearling.scoring.registry import default_for, protection, removers

if TYPE_CHECKING:
    from shearling.engine.ranks import Ranks
    from shearling.model.checkpoint import Checkpoint
    from shearling.scoring.scores import Scores

FEW = TextOptions(samples=10, length=128)  # windows, as in Shortened LLaMA


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """What the command line says."""

    model: ModelOptions
    by: Annotated[
        str | None,
        typer.Option(
            help=f"{BY_HELP} Without: {default_for('blocks')} for blocks, "
            f"{default_for('units')} for units, {default_for('experts')} for experts."
        ),
    ] = None
    axis: Annotated[
        str,
        typer.Option(
            help="What to score: layers, hidden, heads, kv_heads, linear_heads, mlp, experts or "
            "expert_mlp."
        ),
    ] = "layers"
    text: TextOptions = FEW
    seed: Seed = 0
    place: PlaceOptions
    protect: ProtectOptions
    remove: Annotated[
        int | None,
        typer.Option(min=1, help=f"For {' and '.join(removers())}: how many blocks to remove."),
    ] = None
    output: Annotated[Path | None, typer.Option(help="Where to write the scores.")] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be scored and where, and run nothing.")
    ] = False
    as_json: Json = False


@takes_options
def score(options: ScoreOptions) -> None:
    """Score every block of a model, or every unit of a width; the lowest is the first that can go.

    Blocks are scored by default; with --axis, the units that each block has on that axis.
    """
    from shearling.files.writer import write_json
    from shearling.model.checkpoint import Checkpoint
    from shearling.scoring.score import kind_of

    of_blocks = options.axis == "layers"
    by = options.by
    if by is None:
        by = default_for(kind_of(options.axis))
    if options.remove is not None and by not in removers():
        raise ShearlingError(
            f"--remove {options.remove} is for --by {' or '.join(removers())}, which need to know "
            f"how many go; leave it out for --by {by}."
        )
    check_file(options.output)
    source = Checkpoint.open(options.model.given())
    if not of_blocks:
        warn_ignored(options.protect.given, f"units of {options.axis} are scored, not blocks")
    if options.dry_run:
        _print_plan(source, by, options, of_blocks=of_blocks)
        return
    with options.place.joined() as ranks:
        scores = _scores(source, by, options, ranks, of_blocks=of_blocks)
    lines = _block_lines if of_blocks else unit_lines
    if options.output is not None and ranks.first:
        write_json(options.output, scores.as_json())
    print_result(scores.as_json(), options.as_json, lines(scores, options.output))


def _print_plan(source: Checkpoint, by: str, options: ScoreOptions, *, of_blocks: bool) -> None:
    """What would be scored, and where it would run."""
    from shearling.data.calibration import check_sources
    from shearling.engine.ranks import ALONE
    from shearling.model.loading import check_length
    from shearling.scoring.score import checked, no_text, states_kept

    text, ends = options.text, options.protect
    protect = protection(by, ends.protect_first, ends.protect_last) if of_blocks else None
    criterion, protected = checked(source, by, options.axis, protect, options.remove)
    if not criterion.textless:
        if text.sources is None:
            raise no_text(by)
        check_sources(text.sources, source.tokenizer)
        check_length(text.length, source.config, source.name)
    tokens = 0 if criterion.textless else text.samples * text.length
    place = place_of(source, options.place, ALONE, states_kept(source, by, options.axis, tokens))
    plan = {
        "criterion": by, "axis": options.axis, "model": source.name, "tokens": tokens,
        "protected": list(protected), "place": place.lines(),
    }  # fmt: skip
    lines = [f"would score {options.axis} of {source.name} by {by} on {tokens:,} tokens"]
    print_result(plan, options.as_json, [*lines, *place.lines()])


def _scores(
    source: Checkpoint, by: str, options: ScoreOptions, ranks: Ranks, *, of_blocks: bool
) -> Scores:
    from shearling.files.terminal import progress_bars
    from shearling.scoring.score import score as run
    from shearling.scoring.score import states_kept

    text, ends = options.text, options.protect
    need = states_kept(source, by, options.axis, text.samples * text.length)
    place = place_of(source, options.place, ranks, need)
    with progress_bars() as progress:
        return run(
            source, by, axis=options.axis, calibration=text.sources, samples=text.samples,
            length=text.length, seed=options.seed, bos=text.bos, place=place,
            protect=protection(by, ends.protect_first, ends.protect_last) if of_blocks else None,
            remove=options.remove, progress=progress,
        )  # fmt: skip


def _block_lines(scores: Scores, output: Path | None) -> list[str]:
    """Block scores for a person, first to go first."""
    lines = [f"{scores.criterion} scores, first to go first (block: score):"]
    lines += [f"  {block:3d}: {scores.values[block]:.6g}" for block in scores.order]
    return lines + ([f"written to {output}"] if output else [])
