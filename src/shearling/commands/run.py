"""``shearling run``: what the command line says, handed to :mod:`shearling.recipes.run`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shearling.commands.options import Json, MergeAdapter, note, print_result, with_adapter
from shearling.commands.takes import takes_options
from shearling.files.sizes import in_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the command line says."""

    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")]
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Changes to the recipe, such as target.params=0.7x heal.0.lr=1e-4.",
        ),
    ] = None
    output: Annotated[
        Path, typer.Option(help="A directory for all stages, or that of a run to go on with.")
    ]
    source: Annotated[
        str | None, typer.Option(help="The model to make smaller, in place of the recipe's.")
    ] = None
    merge_adapter: MergeAdapter = False
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text in place of the recipe's, as `shearling pack`; may be repeated."),
    ] = None
    device: Annotated[
        str | None, typer.Option(help="What computes: auto, cpu, cuda or cuda:N.")
    ] = None
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print every stage and what it takes, and make nothing."),
    ] = False
    as_json: Json = False


@takes_options
def run(options: RunOptions) -> None:
    """Make a smaller model by a recipe, stage by stage; goes on by itself if it was stopped.

    Each stage is a directory in OUTPUT. A stage that is whole is kept, one that was begun goes on,
    and a changed option makes only those stages anew that depend on it.
    """
    from shearling.files.terminal import progress_bars
    from shearling.recipes.read import read_recipe
    from shearling.recipes.run import RecipeRun

    changes: dict[str, Any] = {"source": options.source, "device": options.device}
    changes = {key: value for key, value in changes.items() if value is not None}
    if options.text:
        changes |= {"data.text": options.text, "data.store": None}
    recipe = read_recipe(options.recipe, options.settings or [], changes)
    if recipe.source is not None:
        source = str(with_adapter(recipe.source, options.merge_adapter))
        recipe = recipe.model_copy(update={"source": source})
    with progress_bars() as progress:
        whole = RecipeRun(recipe, options.output, progress, note)
        if options.dry_run:
            plan = whole.plan()
            whole.check_fits(plan)
            print_result(plan, options.as_json, _plan_lines(plan))
            return
        result = whole.run()
    print_result(result, options.as_json, _lines(result))


def _plan_lines(plan: Mapping[str, Any]) -> list[str]:
    """A row for each stage: how far it is, time, memory, disk."""
    rows = [f"{'stage':<14} {'state':<11} {'time':>9} {'memory':>9} {'disk':>9}"]
    for one in plan["stages"]:
        rows.append(
            f"{one['name']:<14} {one['state']:<11} {_time(one['seconds']):>9} "
            f"{_size(one['memory']):>9} {_size(one['disk']):>9}  {one['says']}"
        )
    left = f"about {_time(plan['seconds'])} for what is left, at speeds that are assumed"
    return [*rows, f"{left}; - where it is not known"]


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def _size(size: int | None) -> str:
    return "-" if size is None else in_bytes(size, 2)


def _lines(result: Mapping[str, Any]) -> list[str]:
    """What was made, for a person."""
    lines = [f"made {', '.join(result['made']) or 'nothing'}"]
    if result["kept"]:
        lines.append(f"kept {', '.join(result['kept'])}, which were whole")
    if result["stopped"]:
        return [*lines, f"stopped in {result['stopped']}; the same command goes on from there"]
    if result["model"]:
        lines.append(f"model: {result['model']}")
    return [*lines, *(f"report: {page}" for page in result["pages"])]
