"""The command line's front door: the list of commands, signals, and the border of errors.

Each command is a file of :mod:`shearling.commands`, imported when it is called. torch and
transformers take seconds to import, so a command imports what it needs when it is run.
"""

# ruff: noqa: E402 - what Ctrl-C does has to be said before the imports

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


def _leave(_signal: int, _frame: object) -> None:
    """What Ctrl-C does before there is anything to tidy up."""
    os.write(2, b"shearling: interrupted before anything was begun.\n")
    os._exit(130)


# The imports below take a moment, in which Ctrl-C would end in a traceback.
if __name__ == "__main__" or Path(sys.argv[0] or ".").stem == "shearling":
    signal.signal(signal.SIGINT, _leave)

import io
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

from shearling.commands.listed import Listed
from shearling.errors import LONGEST, ShearlingError, lacks_memory, reason
from shearling.files.progress import first_process, processes
from shearling.version import __version__

app = typer.Typer(
    name="shearling",
    cls=Listed,
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


def _stop(_signal: int, _frame: object) -> NoReturn:
    sys.exit(143)


def _run() -> None:
    """The command; a rank that torchrun started ends without the interpreter's own teardown.

    There torch 2.13 aborts now and then (1 of 12 launches under load), upon which torchrun would
    end the other ranks, the one that still writes among them.
    """
    try:
        sys.exit(_called())
    except SystemExit as stop:
        if stop.code or processes() == 1:
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _called() -> Any:
    """Call the command; what its parser refuses is raised, to be told as everything else."""
    try:
        return app(standalone_mode=False)
    except Exception as error:
        if type(error).__name__ != "NoArgsIsHelpError":
            raise
        print(error, file=sys.stderr)
        return 2


def main() -> None:
    """Entry point: whatever is raised becomes one line on stderr and an exit code.

    2 for what the user or a file gave, 130 for Ctrl-C, and 1 for what we did not think of.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Read when tqdm is first imported; transformers draws a bar of its own for GGUF files.
    os.environ.setdefault("TQDM_DISABLE", "1")
    # An exit, rather than a kill, lets unfinished outputs be removed.
    signal.signal(signal.SIGTERM, _stop)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be text
        sys.stdout.reconfigure(errors="backslashreplace")
    with _interrupts() as interrupted:
        try:
            _run()
        except SystemExit as stop:  # which is also what typer makes of an interrupt
            if not interrupted() and stop.code != 130:
                raise
        except BaseException as error:
            if os.environ.get("SHEARLING_TRACEBACK"):
                traceback.print_exc()
            # Libraries put an interrupt into errors of their own, or report what it broke.
            if not (interrupted() or isinstance(error, KeyboardInterrupt)):
                code, sentence = _told(error)
                if not first_process():
                    # What every process has to say, the first one says; torchrun ends the others.
                    time.sleep(PATIENCE)
                print(f"shearling: {sentence}", file=sys.stderr)
                sys.exit(code)
        print("shearling: interrupted; nothing half-written was left behind.", file=sys.stderr)
        sys.exit(130)


@contextmanager
def _interrupts() -> Generator[Callable[[], bool]]:
    """Whether Ctrl-C came, even where what it raised was lost on the way."""
    came = False

    def note(*_: object) -> NoReturn:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    def lost(unraisable: Any) -> None:
        """Raise again what came while an object was being removed, where nothing can be raised."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        else:
            sys.__unraisablehook__(unraisable)

    before, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    ours = before in (signal.default_int_handler, _leave)
    if ours:  # not where a program that runs us, or a shell's &, has it otherwise
        signal.signal(signal.SIGINT, note)
        sys.unraisablehook = lost
    try:
        yield lambda: came
    finally:
        if ours:
            # The interpreter's own teardown is no place for another.
            signal.signal(signal.SIGINT, signal.SIG_IGN if before is _leave else before)
            sys.unraisablehook = hook


def _told(error: BaseException) -> tuple[int, str]:
    """The exit code and the sentence for an error."""
    from shearling.commands.asked_wrong import is_refusal, refusal

    if isinstance(error, ShearlingError):
        return 2, str(error)
    if isinstance(error, typer.Abort):
        return 2, "the input ended before all was answered; answer the questions, or give options."
    if is_refusal(error):
        return 2, refusal(error)
    lost = ("closed by peer", "reset by peer", "NCCL", "gloo")
    if processes() > 1 and any(word in str(error) for word in lost):
        return 2, f"another process is gone, which has said why ({reason(error)[:120]})."
    if type(error).__name__ == "OutOfMemoryError":  # torch's; importing it takes seconds
        return 2, (
            f"the device has too little memory ({reason(error).split('. ')[0]}); ask for less at a "
            "time (--length, --window or --batch), give --memory with less than there is, --stream "
            "or --dtype bfloat16 where the command has them, or --device cpu."
        )
    if lacks_memory(error):
        return 2, (
            f"there is not enough memory for this ({reason(error)}); ask for less at a time or in "
            "all, or free some."
        )
    if isinstance(error, OSError):
        return 2, (
            f"a file or directory could not be used ({reason(error)}); --traceback shows where."
        )
    where = traceback.extract_tb(error.__traceback__)[-1]
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    said = " ".join(said.split())[:LONGEST]
    if f"{os.sep}shearling{os.sep}" in where.filename:
        return 1, (
            f"this stopped at an error that shearling did not expect ({said}, in line "
            f"{where.lineno} of {Path(where.filename).name}); check what was given, and report it "
            "with what --traceback shows."
        )
    return 2, (
        f"a library could not go on with what was given ({said}, in {_package(where.filename)}); "
        "check the files that were named, and --traceback shows where."
    )


def _package(filename: str) -> str:
    """The package that a file belongs to."""
    parts = Path(filename).parts
    places = [i for i, part in enumerate(parts) if part in ("site-packages", "dist-packages")]
    return parts[places[-1] + 1] if places else Path(filename).stem


if __name__ == "__main__":
    main()
