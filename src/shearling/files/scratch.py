"""Directories for what is needed for a while; of a process that was killed, the next removes them.

Their names say whose they are: ``shearling-HOST-PROCESS-BEGUN-RANDOM``.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from shearling.files.cache import cache_directory
from shearling.files.locks import is_dead, owner

SCRATCH = "SHEARLING_SCRATCH"  # a directory of the user's choice
_NAME = re.compile(r"shearling-([0-9a-f]{8}-\d+-\d+)-\w+")


@contextmanager
def scratch(place: Path | None = None) -> Generator[Path]:
    """A directory that is gone when the block ends.

    Args:
        place: where; None is the system's own for temporary files.
    """
    directory = new_scratch(place)
    try:
        yield directory
    finally:
        remove(directory)


def new_scratch(place: Path | None = None) -> Path:
    """A directory for whoever calls :func:`remove` in the end."""
    sweep(place)
    return Path(tempfile.mkdtemp(prefix=f"shearling-{owner()}-", dir=place))


def remove(directory: Path) -> None:
    """Remove a directory with all in it, whatever stands in the way."""
    shutil.rmtree(directory, ignore_errors=True)


def sweep(place: Path | None = None) -> None:
    """Remove what processes that have died left in a directory for temporary files."""
    directory = place or Path(tempfile.gettempdir())
    try:
        names = [path.name for path in directory.iterdir()]
    except OSError:  # it may be nobody's to read
        return
    for name in names:
        ours = _NAME.fullmatch(name)
        if ours and is_dead(ours[1]):
            remove(directory / name)


def sweep_all() -> None:
    """Remove what processes that have died left wherever scratch files may be."""
    asked = os.environ.get(SCRATCH)
    for directory in {place.absolute() for place in [*usual(), *([Path(asked)] if asked else [])]}:
        sweep(directory)


def usual() -> list[Path]:
    """Where scratch files may be, unless the user names a directory."""
    return [Path(tempfile.gettempdir()), Path("/var/tmp"), Path(), cache_directory()]
