"""``shearling init``: four questions, handed to :mod:`shearling.recipes.start`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from shearling.commands.options import Json, MergeAdapter, check_file, print_result, with_adapter
from shearling.commands.takes import takes_options
from shearling.errors import ShearlingError


@dataclass(frozen=True, kw_only=True)
class InitOptions:
    """What the command line says."""

    model: Annotated[
        str | None, typer.Option(help="A model directory, a .gguf file or a hub id.")
    ] = None
    merge_adapter: MergeAdapter = False
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text, as `shearling pack` takes it; may be repeated."),
    ] = None
    size: Annotated[
        str | None,
        typer.Option(
            help="How small or how fast: 0.8x or 113M (parameters), '24 blocks', '1.3x faster', "
            "20ms (for a token), '0.7x memory' or 8GB (weights and cache)."
        ),
    ] = None
    machine: Annotated[
        str | None, typer.Option(help="cpu, gpu, or auto: a GPU if there is one.")
    ] = None
    output: Annotated[Path, typer.Option(help="The recipe, a YAML file.")] = Path("recipe.yaml")
    as_json: Json = False


@takes_options
def init(options: InitOptions) -> None:
    """Write a recipe from four answers: model, text, how small or how fast, which machine.

    What no option says is asked on the terminal.
    """
    output = options.output
    check_file(output)
    if output.exists():
        raise ShearlingError(f"--output {output} is there already; name another file.")
    model = options.model or _ask("Which model (a directory, a .gguf file or a hub id)", "--model")
    text = options.text or [_ask("Which text (a file, a directory or a glob)", "--text")]
    size = options.size or _ask(
        "How small (0.8x, 113M, 24 blocks, 0.7x memory) or how fast (1.3x faster, 20ms)", "--size"
    )
    machine = options.machine or _ask("Which machine (cpu, gpu or auto)", "--machine", "auto")
    from shearling.files.writer import write_text
    from shearling.recipes.start import RecipeAnswers, recipe_text

    model = str(with_adapter(model, options.merge_adapter))
    answers = RecipeAnswers(model, tuple(text), size, machine)
    written = recipe_text(answers, output.absolute().parent)
    write_text(output, written)
    lines = [f"wrote {output}; run it with `shearling run {output} --output DIR`"]
    print_result({"recipe": str(output)}, options.as_json, lines)


def _ask(question: str, option: str, default: str | None = None) -> str:
    """An answer from the terminal (ShearlingError where there is none)."""
    if not sys.stdin.isatty():
        if default is not None:
            return default
        raise ShearlingError(
            f"there is no terminal to ask on, and {option} was not given; give it."
        )
    return typer.prompt(question, default=default, err=True)
