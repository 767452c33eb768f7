"""Outputs that are filled over several runs, shard by shard: locked, and kept where a run ends.

The parts that are finished lie in the output itself; what a run is at, and its lock, in a directory
inside.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from shearling.errors import ShearlingError
from shearling.files.locks import lock
from shearling.files.staging import being_written, make_directory, remove_empty


@contextmanager
def alone(directory: Path, output: Path | None = None) -> Generator[None]:
    """Refuse to work where another process does; a killed one does not stand in the way.

    Args:
        directory: what is locked; made if it is not there, and removed if nothing came of it.
        output: what errors call it; its parent, if not given.

    Raises:
        ShearlingError: another process works there, which is named; or nothing can be written.
    """
    made = make_directory(directory)
    handle = os.open(directory, os.O_RDONLY)
    try:
        if lock(handle) is False:
            raise being_written(output or directory.parent, handle)
        try:
            yield
        finally:
            remove_empty(made)  # of what was refused nothing is left; with shards in it, it stays
    finally:
        os.close(handle)


class StoppedError(ShearlingError):
    """A run ended for no fault of what it was given: what it finished stays, and it can go on."""


@contextmanager
def withdrawn(*begun: Path, keep: Callable[[bool], bool]) -> Generator[None]:
    """Remove what a run began if it ends early and nothing of it is worth keeping.

    Args:
        begun: directories that it fills.
        keep: whether they stay, given whether it was refused for what it was given.
    """
    try:
        yield
    except BaseException as error:
        refused = isinstance(error, ShearlingError) and not isinstance(error, StoppedError)
        if not keep(refused):
            for directory in begun:
                shutil.rmtree(directory, ignore_errors=True)
        raise


@contextmanager
def kept_on_a_full_disk(output: Path) -> Generator[None]:
    """Turn a full disk into one sentence: what is finished stays, and the command goes on."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise StoppedError(
            f"the disk ran full while writing {output}; what is finished is kept, so free some "
            "space and give the same command again."
        ) from error
