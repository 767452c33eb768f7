"""Options that several commands share, and the reading of their values."""

from __future__ import annotations

import re
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shearling.data.seeds import LARGEST
from shearling.errors import ShearlingError
from shearling.files.amounts import BYTES, amount, pointed
from shearling.files.json_text import json_text
from shearling.files.progress import first_process, processes
from shearling.scoring.registry import PLUS, by_help

if TYPE_CHECKING:
    from shearling.data.sources import TextSource
    from shearling.engine.place import Need, Place, Wish
    from shearling.engine.ranks import Ranks
    from shearling.model.checkpoint import Checkpoint

BY_HELP = by_help()
Model = Annotated[str, typer.Argument(help="A model directory, a .gguf file or a hub id.")]
Models = Annotated[list[str], typer.Argument(help="Model directories, .gguf files or hub ids.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[NAME=]PATH[:SHARE]",
        help="Text to score with: .jsonl with a 'text' field or conversations, .txt, or a "
        "directory. Several, each given so, share the windows: web=c4.jsonl:0.7, "
        "chat=talks.jsonl:0.3; without shares alike.",
    ),
]
LlamaCppPrograms = Annotated[
    Path | None,
    typer.Option(help="A directory with llama.cpp's programs; default $LLAMA_CPP, then PATH."),
]
VllmProgram = Annotated[
    Path | None, typer.Option(help="The vllm program of its environment; default on the PATH.")
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
Computer = Annotated[
    str, typer.Option("--device", help="What computes: auto, cpu, cuda or cuda:N.")
]
Precision = Annotated[
    str,
    typer.Option(
        "--dtype", help="What is computed in: auto (bfloat16 on a GPU), float32 or bfloat16."
    ),
]
CardMemory = Annotated[
    str | None,
    typer.Option("--memory", help="Of a GPU's memory, use at most this, such as 20GB."),
]
MeasuredIn = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="What is computed in: auto (bfloat16 on a GPU where a model has a billion parameters "
        "or more, else float32), float32, bfloat16 or float16.",
    ),
]
Bos = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos",
        help="Begin every window of text with BOS, which is never predicted; by default where "
        "the model's tokenizer puts one before a text.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=LARGEST, help="Seed of every random choice.")]
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
    typer.Option(
        min=0, help=f"Never remove the first so many blocks (the + forms: {PLUS[0]}; else 0)."
    ),
]
ProtectLast = Annotated[
    int | None,
    typer.Option(
        min=0, help=f"Never remove the last so many blocks (the + forms: {PLUS[1]}; else 0)."
    ),
]
MergeAdapter = Annotated[
    bool,
    typer.Option(
        "--merge-adapter",
        help="Merge an adapter that lies in a model's directory (once, into the cache, with peft), "
        "and take what comes of it.",
    ),
]
Batches = Annotated[str, typer.Option("--batch", help="Batch sizes, separated by commas.")]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A model, and what becomes of an adapter in its directory."""

    model: Model
    merge_adapter: MergeAdapter = False

    def given(self) -> str | Path:
        """The model to be opened: as it was named, or with its adapter merged."""
        return self.beside(self.model)

    def beside(self, model: str) -> str | Path:
        """The same of another model."""
        return with_adapter(model, self.merge_adapter)


@dataclass(frozen=True, kw_only=True)
class ModelsOptions:
    """The same of several models."""

    models: Models
    merge_adapter: MergeAdapter = False

    def given(self) -> list[str | Path]:
        """The models to be opened: as they were named, or with their adapters merged."""
        return [with_adapter(model, self.merge_adapter) for model in self.models]


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What heal and learn both ask for: the data, where the run is kept, and what computes."""

    data: TokenStore
    tokens: TrainingTokens
    output: RunOutput
    reference: References = None
    device: Computer = "auto"
    dtype: Precision = "auto"
    memory: CardMemory = None
    bos: Bos = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, and train nothing.")
    ] = False

    def allowed(self) -> int | None:
        """Bytes of a GPU that may be used at most."""
        return None if self.memory is None else size_in_bytes(self.memory, "--memory")


@dataclass(frozen=True, kw_only=True)
class PlaceOptions:
    """Where a model runs block by block."""

    device: Computer = "auto"
    dtype: Annotated[
        str,
        typer.Option(
            help="What blocks compute in: auto (bfloat16 for models of a billion parameters and "
            "more on a GPU, else float32), float32 or bfloat16."
        ),
    ] = "auto"
    memory: CardMemory = None
    stream: Stream = None

    @property
    def given(self) -> dict[str, Any]:
        """By the names of the options, where the user said something, for warnings."""
        return {
            "--device": None if self.device == "auto" else self.device,
            "--dtype": None if self.dtype == "auto" else self.dtype,
            "--memory": self.memory,
            "--stream": self.stream,
        }

    def wish(self, ranks: Ranks | None = None) -> Wish:
        """The same for :meth:`shearling.engine.place.Place.best`; ``ranks`` share the work."""
        from shearling.engine.place import Wish
        from shearling.engine.ranks import ALONE

        memory = None if self.memory is None else size_in_bytes(self.memory, "--memory")
        return Wish(
            device=self.device, dtype=self.dtype, stream=self.stream, memory=memory,
            ranks=ranks or ALONE,
        )  # fmt: skip

    @contextmanager
    def joined(self) -> Generator[Ranks]:
        """The processes that torchrun started, until the work is done; or this one alone."""
        from shearling.engine.ranks import ALONE, join_ranks, leave

        if processes() == 1:
            yield ALONE
            return
        ranks = join_ranks(self.device)
        try:
            yield ranks
        finally:
            leave()


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Calibration text, and how much of it is read."""

    calibration: Calibration = None
    samples: Samples = 64
    length: Length = 256
    bos: Bos = None

    @property
    def sources(self) -> tuple[TextSource, ...] | None:
        """The text, as one source or several; None where there is none."""
        from shearling.data.sources import parse_sources

        return parse_sources(self.calibration) if self.calibration else None


@dataclass(frozen=True, kw_only=True)
class ProtectOptions:
    """Blocks at both ends that never go."""

    protect_first: ProtectFirst = None
    protect_last: ProtectLast = None

    @property
    def given(self) -> dict[str, int | None]:
        """By the names of the options, for warnings."""
        return {"--protect-first": self.protect_first, "--protect-last": self.protect_last}


def with_adapter(model: str, merge: bool) -> str | Path:
    """A model as it was named, or the directory in which its adapter is merged into it."""
    if not merge or Path(model).is_file():
        return model
    from shearling.model import adapters
    from shearling.model.resolve import locate

    if not adapters.has_adapter(directory := locate(model)):
        return model
    path = adapters.merged(directory)
    note(f"{model} is taken with its adapter merged: {path}.")
    return path


def place_of(
    model: Checkpoint, options: PlaceOptions, ranks: Ranks, need: Need | None = None
) -> Place:
    """Where a model runs, by what the user asked for and what is free; told when it is opened."""
    from shearling.engine.place import Place

    return replace(Place.best(model, options.wish(ranks), need), tell=note)


def tell_measured(asked: str, device: str, dtype: str) -> None:
    """Say that ``--device auto`` took a GPU, and in which numbers it computes."""
    if asked == "auto" and device != "cpu":
        note(f"{device} measures, in {dtype}; --device and --dtype have it otherwise.")


def check_file(output: Path | None) -> None:
    """Refuse a name that cannot become a file, or not there, before any work is done."""
    if output is not None:
        from shearling.files import staging

        try:
            staging.check_file(output)
        except ShearlingError as error:
            raise ShearlingError(f"--output {error}") from error


def size_in_bytes(text: str, option: str) -> int:
    """Bytes that a user writes as 20GB, 512MB or 16GiB."""
    given = amount(text, BYTES)
    if given is None:
        raise ShearlingError(
            f"{option} {text!r} was given, but a size such as 20GB or 16GiB was expected"
            f"{pointed(text)}."
        )
    number, unit = given
    return int(number * BYTES[unit])


def seconds(text: str, option: str) -> float:
    """Seconds that a user writes as 90s, 90, 2m or 1.5h."""
    units = {"": 1, "s": 1, "m": 60, "h": 3600}
    given = amount(text, units)
    if given is None or not given[0]:
        raise ShearlingError(
            f"{option} {text!r} was given, but a time such as 90s or 2m was expected"
            f"{pointed(text)}."
        )
    return float(given[0] * units[given[1]])


def numbers(text: str, option: str, least: int | None = None) -> list[int]:
    """Whole numbers separated by commas, none below ``least``."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("-?[0-9]{1,18}", part) for part in parts):
        shown = text if len(text) <= 60 else text[:57] + "..."
        raise ShearlingError(
            f"{option} {shown!r} was given, but whole numbers separated by commas were expected, "
            "such as 1,8."
        )
    given = [int(part) for part in parts]
    if least is not None and (few := [one for one in given if one < least]):
        raise ShearlingError(
            f"{option} {few[0]} was given, but numbers of at least {least} were expected, such as "
            "1,8."
        )
    return given


def unit_lines(scores: Any, output: Path | None) -> list[str]:
    """Unit scores for a person: the least and the median of each block."""
    from statistics import median

    lines = [f"{scores.criterion} scores of {scores.axis} by block (least, median, most):"]
    for block, row in enumerate(scores.rows):
        lines.append(f"  {block:3d}: {min(row):.4g}  {median(row):.4g}  {max(row):.4g}")
    return lines + ([f"written to {output}"] if output else [])


def warn_ignored(options: Mapping[str, Any], reason: str) -> None:
    """Say on stderr which of the options given have no effect, and why."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        warn(f"{', '.join(given)} ignored: {reason}.")


def note(sentence: str) -> None:
    """Say on stderr what was decided for the user; of several processes the first one does."""
    if first_process():
        print(f"shearling: {sentence}", file=sys.stderr)


def warn(sentence: str) -> None:
    """Say something on stderr that the user should know; likewise."""
    if first_process():
        print(f"shearling: warning: {sentence}", file=sys.stderr)


def print_result(result: Any, as_json: bool, lines: Sequence[str]) -> None:
    """Print what a command found on stdout, at once: as JSON, or in lines for a person.

    Of several processes the first one does.
    """
    if not first_process():
        return
    print(json_text(result, indent=2) if as_json else "\n".join(lines))
    sys.stdout.flush()
