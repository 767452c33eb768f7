"""``shearling score``: what the command line says, checked, and handed to the criteria."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shearling.commands.options import (
    BY_HELP,
    Json,
    Model,
    ProtectOptions,
    Seed,
    Stream,
    TextOptions,
    check_file,
    place_of,
    print_result,
    protection,
    unit_lines,
    warn_ignored,
)
from shearling.commands.takes import takes_options
from shearling.errors import ShearlingError

if TYPE_CHECKING:
    from shearling.model.checkpoint import Checkpoint
    from shearling.scoring.scores import Scores
    from shearling.scoring.unit_scores import UnitScores

FEW = TextOptions(samples=10, length=128)  # windows, as in Shortened LLaMA
FOR_A_COUNT = ("greedy", "repair")  # criteria that need to know how many blocks go


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """What the command line says."""

    model: Model
    by: Annotated[
        str | None,
        typer.Option(help=f"{BY_HELP} Without: perplexity for blocks, fisher-energy for units."),
    ] = None
    axis: Annotated[
        str, typer.Option(help="What to score: layers, hidden, heads, kv_heads or mlp.")
    ] = "layers"
    text: TextOptions = FEW
    seed: Seed = 0
    stream: Stream = None
    protect: ProtectOptions
    remove: Annotated[
        int | None, typer.Option(min=1, help="For greedy and repair: how many blocks to remove.")
    ] = None
    output: Annotated[Path | None, typer.Option(help="Where to write the scores.")] = None
    as_json: Json = False


@takes_options
def score(options: ScoreOptions) -> None:
    """Score every block of a model, or every unit of a width; the lowest is the first that can go.

    Blocks are scored by default; with --axis, the units that each block has on that axis.
    """
    from shearling.model.checkpoint import Checkpoint

    of_blocks = options.axis == "layers"
    by = options.by or ("perplexity" if of_blocks else "fisher-energy")
    if options.remove is not None and by not in FOR_A_COUNT:
        raise ShearlingError(
            f"--remove {options.remove} is for --by greedy or repair, which need to know how many "
            f"go; leave it out for --by {by}."
        )
    check_file(options.output)
    source = Checkpoint.open(options.model)
    if of_blocks:
        scores = _score_blocks(source, by, options)
        _finish(scores, options, _block_lines(scores, options.output))
    else:
        warn_ignored(options.protect.given, f"units of {options.axis} are scored, not blocks")
        units = _score_units(source, by, options)
        _finish(units, options, unit_lines(units, options.output))


def _score_blocks(source: Checkpoint, by: str, options: ScoreOptions) -> Scores:
    from shearling.files.terminal import progress_bars
    from shearling.scoring.registry import score as run

    text, place = options.text, place_of(source, options.stream)
    with progress_bars() as progress:
        return run(
            source, by, calibration=text.calibration, samples=text.samples, length=text.length,
            seed=options.seed, place=place, protect=protection(by, options.protect),
            remove=options.remove, progress=progress,
        )  # fmt: skip


def _score_units(source: Checkpoint, by: str, options: ScoreOptions) -> UnitScores:
    from shearling.files.terminal import progress_bars
    from shearling.pruning.run import Run
    from shearling.repair.calibration import Calibration

    given, text = options.text, None
    if given.calibration is not None:
        text = Calibration(given.calibration, given.samples, given.length, options.seed)
    with progress_bars() as progress:
        run = Run(source, text, place=place_of(source, options.stream), progress=progress)
        return run.score_axis(by, options.axis)


def _block_lines(scores: Scores, output: Path | None) -> list[str]:
    """Block scores for a person, first to go first."""
    lines = [f"{scores.criterion} scores, first to go first (block: score):"]
    lines += [f"  {block:3d}: {scores.values[block]:.6g}" for block in scores.order]
    return lines + ([f"written to {output}"] if output else [])


def _finish(scores: Scores | UnitScores, options: ScoreOptions, lines: Sequence[str]) -> None:
    """Write the scores if asked, and print them."""
    from shearling.files.writer import write_json

    if options.output is not None:
        write_json(options.output, scores.as_json())
    print_result(scores.as_json(), options.as_json, lines)
