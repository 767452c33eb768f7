"""``shearling write``: what the command line says, checked, and handed to :mod:`data.own_text`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shearling.commands.options import (
    Bos,
    Json,
    ModelOptions,
    PlaceOptions,
    Seed,
    VllmProgram,
    place_of,
    print_result,
    tell_measured,
    warn_ignored,
)
from shearling.commands.takes import takes_options
from shearling.errors import ShearlingError

if TYPE_CHECKING:
    from shearling.data.authors import Author
    from shearling.model.checkpoint import Checkpoint

ENGINES = ("transformers", "vllm")


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """What the command line says."""

    model: ModelOptions
    tokens: Annotated[str, typer.Option(help="How many to write, such as 200k, 1.5M or 2B.")]
    output: Annotated[
        Path, typer.Option(help="A new .jsonl file, or that of a run that was stopped.")
    ]
    begin_from: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="TEXT",
            help="Begin each sequence with a few tokens of this text: .jsonl, .txt or a directory. "
            "Without, with BOS, or with a word drawn by chance where the tokenizer puts no BOS.",
        ),
    ] = None
    template: Annotated[
        bool,
        typer.Option("--template", help="Begin each as the chat template begins what a user says."),
    ] = False
    length: Annotated[int, typer.Option(min=2, help="Tokens in each sequence.")] = 512
    batch: Annotated[
        int | None,
        typer.Option(
            min=1, help="Sequences at a time; by default as many as memory allows, with vllm 64."
        ),
    ] = None
    engine: Annotated[
        str, typer.Option(help="What runs the model: transformers, or vllm on a server.")
    ] = "transformers"
    vllm: VllmProgram = None
    bos: Bos = None
    seed: Seed = 0
    place: PlaceOptions
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")
    ] = False
    as_json: Json = False


@takes_options
def write(options: WriteOptions) -> None:
    """Have a model write text from its own distribution, to calibrate or train with.

    Goes on by itself if it was stopped. An end of text begins another document.
    """
    from shearling.data.own_text import BYTES, OwnText, OwnTextRun
    from shearling.files.terminal import progress_bars
    from shearling.model.checkpoint import Checkpoint
    from shearling.pruning.plan import parse_count

    wanted = OwnText(
        tokens=parse_count(options.tokens, "--tokens"), length=options.length, seed=options.seed,
        bos=options.bos, template=options.template, begin_from=options.begin_from,
        batch=options.batch,
    )  # fmt: skip
    source = Checkpoint.open(options.model.given())
    run = OwnTextRun(source, wanted, options.output, _author(source, options))
    if options.dry_run:
        plan, done = run.begun, run.done
        tokens = plan.sequences * plan.length
        described = plan.to_json() | {"tokens": tokens, "done": done, "bytes": tokens * BYTES}
        lines = [
            f"would write {plan.sequences:,} sequences of {plan.length:,} tokens, {plan.batch:,} "
            f"at a time, {done:,} of them done already: about {tokens * BYTES / 1e6:,.1f} MB"
        ]
        print_result(described, options.as_json, [*lines, *run.author.lines()])
        return
    with progress_bars() as progress:
        written = run.write(progress)
    print_result(written, options.as_json, _lines(written, options))


def _author(source: Checkpoint, options: WriteOptions) -> Author:
    """What has the model write, on the engine that was named."""
    from shearling.data.authors import ResidentAuthor
    from shearling.engine.devices import measured_on
    from shearling.engine.ranks import ALONE

    if options.engine not in ENGINES:
        raise ShearlingError(
            f"--engine {options.engine} was given, but text is written with "
            f"{' or '.join(ENGINES)}; give one of these."
        )
    if options.engine == "transformers":
        warn_ignored({"--vllm": options.vllm}, "it is for --engine vllm")
        return ResidentAuthor(place_of(source, options.place, ALONE))
    from shearling.evaluate.engines.serving import ServingOptions
    from shearling.evaluate.engines.vllm_author import VllmAuthor
    from shearling.evaluate.engines.vllm_server import find_vllm

    asked = options.place
    ignored = {"--memory": asked.memory, "--stream": asked.stream}
    warn_ignored(ignored, "vllm decides for itself what it holds where")
    device, dtype = measured_on(asked.device, asked.dtype, [source.parameters], ours=False)
    tell_measured(asked.device, device, dtype)
    return VllmAuthor(ServingOptions(find_vllm(options.vllm), device, dtype))


def _lines(written: dict[str, Any], options: WriteOptions) -> list[str]:
    return [
        f"{written['tokens']:,} tokens in {written['documents']:,} documents, "
        f"{written['bytes'] / 1e6:,.1f} MB",
        f"wrote {options.output}",
        f"next: shearling pack {options.output} --tokenizer {options.model.model} --output STORE",
    ]
