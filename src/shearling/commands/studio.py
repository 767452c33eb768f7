"""``shearling studio``: what the command line says, checked, and handed to :mod:`studio.serve`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import typer

from shearling.commands.options import Computer, MeasuredIn, ModelsOptions, warn
from shearling.commands.takes import takes_options
from shearling.errors import ShearlingError


@dataclass(frozen=True, kw_only=True)
class StudioOptions:
    """What the command line says."""

    models: ModelsOptions
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than loopback have no password.")
    ] = "127.0.0.1"
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8465
    together: Annotated[
        bool, typer.Option("--together", help="Answer all at once; in turns, speeds are fair.")
    ] = False
    dtype: MeasuredIn = "auto"
    device: Computer = "auto"
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")] = None


@takes_options
def studio(options: StudioOptions) -> None:
    """Open a local page on which the models answer your prompts side by side.

    Each model has a process of its own. The first is what the others are measured by.
    """
    try:
        from shearling.studio.serve import Serving, serve, warning
    except ModuleNotFoundError as error:
        raise ShearlingError(
            f"the studio needs {error.name}, which is not installed; "
            "pip install 'shearling[studio]'."
        ) from error
    from shearling.files.terminal import progress_bars

    if sentence := warning(options.host):
        warn(sentence)
    serving = Serving(
        options.host, options.port, together=options.together, dtype=options.dtype,
        device=options.device, threads=options.threads,
    )  # fmt: skip
    with progress_bars() as progress:
        serve(options.models.given(), serving, ready=_ready, progress=progress)


def _ready(address: str) -> None:
    print(f"studio: {address}  (Ctrl-C ends it)")
    sys.stdout.flush()
