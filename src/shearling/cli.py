"""The command line's front door: the list of commands, signals, and the border of errors.

Each command is a file of :mod:`shearling.commands`. torch and transformers take seconds to import,
so every command imports what it needs when it is run.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from typing import Annotated, NoReturn

import typer

from shearling.commands.bench import bench
from shearling.commands.compare import compare
from shearling.commands.demo import demo
from shearling.commands.eval import evaluate
from shearling.commands.export import export
from shearling.commands.heal import heal
from shearling.commands.inspect import inspect
from shearling.commands.judge import judge
from shearling.commands.learn import learn
from shearling.commands.pack import pack
from shearling.commands.prune import prune
from shearling.commands.quantize import quantize
from shearling.commands.reference import reference
from shearling.commands.report import report
from shearling.commands.score import score
from shearling.commands.studio import studio
from shearling.commands.teach import teach
from shearling.errors import ShearlingError
from shearling.files.progress import first_process, processes
from shearling.version import __version__

app = typer.Typer(
    name="shearling",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Make smaller language models out of larger pretrained ones: score, cut, prove, measure.",
)


# What torchrun may start in several processes; the rest is one process's work.
SHARED = ("prune", "score", "teach", "reference", "heal", "learn")
PATIENCE = 3.0  # seconds for the first process to say what all have to say


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
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
    command = context.invoked_subcommand
    if processes() > 1 and command is not None and command not in SHARED:
        raise ShearlingError(
            f"{processes()} processes were started, but `shearling {command}` is one process's "
            f"work; start it without torchrun, which {', '.join(SHARED)} can use."
        )


app.command()(inspect)
app.command()(score)
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
app.command()(report)
app.command()(demo)


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
        if stop.code or processes() == 1:
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
    except (ShearlingError, OSError, RuntimeError) as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        if not first_process():
            # What every process has to say, the first one says; torchrun then ends the others.
            time.sleep(PATIENCE)
        if os.environ.get("SHEARLING_TRACEBACK"):
            traceback.print_exc()
        print(f"shearling: {sentence}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as stop:  # which is what typer makes of an interrupt
        if stop.code == 130:
            print("shearling: interrupted; nothing half-written was left behind.", file=sys.stderr)
        raise


def _sentence(error: Exception) -> str | None:
    """What to say of an error; None if it is a fault of ours."""
    if isinstance(error, ShearlingError):
        return str(error)
    if isinstance(error, OSError):
        return _refused(error)
    reason = " ".join(str(error).split())
    if type(error).__name__ == "OutOfMemoryError":  # torch's; importing it takes seconds
        return (
            f"the device has too little memory ({reason.split('. ')[0]}); give --memory with less "
            "than there is or --stream, shorter sequences (--length), or --device cpu."
        )
    lost = ("closed by peer", "reset by peer", "NCCL", "gloo")
    if processes() > 1 and any(word in reason for word in lost):
        return f"another process is gone, which has said why ({reason[:120]})."
    return None


def _refused(error: OSError) -> str:
    """What the operating system, or a library in its name, would not do."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"a file or directory could not be used ({reason}); --traceback shows where."


if __name__ == "__main__":
    main()
