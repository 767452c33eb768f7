"""``shearling teach``: what the command line says, checked, and handed to :mod:`train.teach`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from shearling.commands.options import Json, Model, Stream, TokenStore, place_of


def teach(
    model: Model,
    data: TokenStore,
    output: Annotated[Path, typer.Option(help="A new directory, or an unfinished one to go on.")],
    top: Annotated[int, typer.Option(min=1, help="Tokens kept of each distribution.")] = 64,
    stream: Stream = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, and run nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Keep a teacher's likeliest next tokens on disk, for `shearling heal --teacher-cache`.

    The teacher is run once over every sequence to train on, and is in memory no more while the
    smaller model is healed.
    """
    from shearling.data.store import Store
    from shearling.files.terminal import progress_bars
    from shearling.model.checkpoint import Checkpoint
    from shearling.train.teach import check, cost
    from shearling.train.teach import teach as run

    teacher, store = Checkpoint.open(model), Store.open(data)
    check(teacher, store, output, top)
    expected = cost(teacher, store, top)
    if not dry_run:
        with progress_bars() as progress:
            cache = run(
                teacher, store, output, top=top, place=place_of(teacher, stream), progress=progress
            )
        described = dict(cache.manifest) | {"fingerprint": cache.fingerprint}
        lines = [
            f"{expected.sequences:,} sequences, {expected.bytes / 1e9:,.2f} GB",
            f"wrote {output}",
        ]
    else:
        described, lines = expected.as_json(), [expected.as_text()]
    print(json.dumps(described, indent=2, ensure_ascii=False) if as_json else "\n".join(lines))
    sys.stdout.flush()
