"""``shearling report``: one page of everything that was measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from shearling.commands.options import Json, check_file, print_result
from shearling.commands.takes import takes_options


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What the command line says."""

    directories: Annotated[list[Path], typer.Argument(help="Directories that hold results.")]
    output: Annotated[Path, typer.Option(help="The HTML file.")] = Path("report.html")
    as_json: Json = False


@takes_options
def report(options: ReportOptions) -> None:
    """Make one self-contained HTML page of everything that was measured."""
    from shearling.report import write_report

    check_file(options.output)
    page = write_report(options.directories, options.output)
    print_result({"report": str(page)}, options.as_json, [f"wrote {page}"])
