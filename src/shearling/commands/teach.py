"""``shearling teach``: what the command line says, checked, and handed to :mod:`train.teach`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from shearling.commands.options import (
    Bos,
    Json,
    ModelOptions,
    PlaceOptions,
    TokenStore,
    place_of,
    print_result,
)
from shearling.commands.takes import takes_options
from shearling.files.sizes import in_bytes


@dataclass(frozen=True, kw_only=True)
class TeachOptions:
    """What the command line says."""

    model: ModelOptions
    data: TokenStore
    output: Annotated[Path, typer.Option(help="A new directory, or an unfinished one to go on.")]
    top: Annotated[int, typer.Option(min=1, help="Tokens kept of each distribution.")] = 64
    bos: Bos = None
    place: PlaceOptions
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, and run nothing.")
    ] = False
    as_json: Json = False


@takes_options
def teach(options: TeachOptions) -> None:
    """Keep a teacher's likeliest next tokens on disk, for `shearling heal --teacher-cache`.

    The teacher is run once over every sequence to train on, and is in memory no more while the
    smaller model is healed.
    """
    from shearling.data.store import Store
    from shearling.engine.ranks import ALONE
    from shearling.files.terminal import progress_bars
    from shearling.model.checkpoint import Checkpoint
    from shearling.train.teach import check, cost
    from shearling.train.teach import teach as run

    teacher, store = Checkpoint.open(options.model.given()), Store.open(options.data)
    check(teacher, store, options.output, options.top, options.bos)
    expected = cost(teacher, store, options.top)
    if not options.dry_run:
        with options.place.joined() as ranks, progress_bars() as progress:
            cache = run(
                teacher,
                store,
                options.output,
                top=options.top,
                bos=options.bos,
                place=place_of(teacher, options.place, ranks),
                progress=progress,
            )
        described = cache.manifest.to_json() | {"fingerprint": cache.fingerprint}
        lines = [
            f"{expected.sequences:,} sequences, {in_bytes(expected.bytes, 2)}",
            f"wrote {options.output}",
        ]
    else:
        where = place_of(teacher, options.place, ALONE).lines()
        described, lines = expected.as_json(), [expected.as_text(), *where]
    print_result(described, options.as_json, lines)
