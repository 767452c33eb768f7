"""Options that several commands share, and the reading of their values."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from shearling.errors import ShearlingError

BY_HELP = (
    "For blocks repair, perplexity, taylor+, magnitude+, taylor, magnitude, influence or greedy; "
    "for units fisher-energy, fisher, energy, obs, flap, wanda-sp, activation, taylor, "
    "taylor-element, magnitude-l1, magnitude-l2 or random; in a cut of both, one of each, "
    "separated by a comma."
)
Model = Annotated[str, typer.Argument(help="A model directory, a .gguf file or a hub id.")]
Models = Annotated[list[str], typer.Argument(help="Model directories, .gguf files or hub ids.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Calibration = Annotated[
    Path | None,
    typer.Option(help="Text to score with: .jsonl with a 'text' field, .txt, or a directory."),
]
Samples = Annotated[int, typer.Option(min=1, help="Calibration sequences.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens in each sequence.")]
TokenStore = Annotated[Path, typer.Option(help="A token store, as `shearling pack` writes it.")]
TrainingTokens = Annotated[
    str, typer.Option(help="How many to train on, such as 200k, 1.5M or 2B.")
]
RunOutput = Annotated[Path, typer.Option(help="A new directory, or that of a run to go on with.")]
References = Annotated[
    Path | None, typer.Option(help="Reference losses for mix=dynamic, from `shearling reference`.")
]
Device = Annotated[str, typer.Option(help="What computes: auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str, typer.Option(help="What is computed in: auto (bfloat16 on a GPU), float32 or bfloat16.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random choice.")]
Stream = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        help="Read blocks from disk one at a time, or hold the model in memory; "
        "by default whichever the free memory allows.",
    ),
]
ProtectFirst = Annotated[
    int | None,
    typer.Option(min=0, help="Never remove the first so many blocks (the + forms: 4; else 0)."),
]
ProtectLast = Annotated[
    int | None,
    typer.Option(min=0, help="Never remove the last so many blocks (the + forms: 2; else 0)."),
]
Batches = Annotated[str, typer.Option("--batch", help="Batch sizes, separated by commas.")]


def protection(by: str, first: int | None, last: int | None) -> tuple[int, int] | None:
    """How many of the first and last blocks stay, if the user says; else None."""
    if first is None and last is None:
        return None
    from shearling.scoring.registry import PROTECT_FIRST, PROTECT_LAST

    default = (PROTECT_FIRST, PROTECT_LAST) if by.endswith("+") else (0, 0)
    return default[0] if first is None else first, default[1] if last is None else last


def place_of(model: Any, stream: bool | None, need: Any = None) -> Any:
    """Where a model runs, by what the user asked for and what is free."""
    from shearling.engine.place import Place, Wish

    return Place.best(model, Wish(stream=stream), need)


def check_file(output: Path | None) -> None:
    """Refuse a name that cannot become a file before any work is done."""
    if output is not None and output.is_dir():
        raise ShearlingError(f"--output {output} is a directory; name a file.")


def numbers(text: str, option: str) -> list[int]:
    """Whole numbers separated by commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ShearlingError(
            f"{option} {text!r} was given, but whole numbers separated by commas were expected, "
            "such as 1,8."
        ) from None


def unit_lines(scores: Any, output: Path | None) -> list[str]:
    """Unit scores for a person: the least and the median of each block."""
    from statistics import median

    lines = [f"{scores.criterion} scores of {scores.axis} by block (least, median, most):"]
    for block, row in enumerate(scores.values):
        lines.append(f"  {block:3d}: {min(row):.4g}  {median(row):.4g}  {max(row):.4g}")
    return lines + ([f"written to {output}"] if output else [])


def warn_ignored(options: Mapping[str, Any], reason: str) -> None:
    """Say on stderr which of the options given have no effect, and why."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        warn(f"{', '.join(given)} ignored: {reason}.")


def note(sentence: str) -> None:
    """Say on stderr what was decided for the user."""
    print(f"shearling: {sentence}", file=sys.stderr)


def warn(sentence: str) -> None:
    """Say something on stderr that the user should know."""
    print(f"shearling: warning: {sentence}", file=sys.stderr)


def print_result(result: Any, as_json: bool, lines: Sequence[str]) -> None:
    """Print what a command found on stdout, at once: as JSON, or in lines for a person."""
    print(json.dumps(result, indent=2, ensure_ascii=False) if as_json else "\n".join(lines))
    sys.stdout.flush()
