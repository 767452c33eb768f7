"""Outputs that are filled over several runs, shard by shard: locked, and kept where a run ends.

The parts that are finished lie in the output itself; what a run is at, and its lock, in a directory
inside that goes when the whole is there.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from shearling.errors import ShearlingError


@contextmanager
def alone(unfinished: Path) -> Generator[None]:
    """Refuse to work where another process does; a killed one does not stand in the way."""
    unfinished.mkdir(parents=True, exist_ok=True)
    handle = os.open(unfinished, os.O_RDONLY)
    try:
        _lock(handle, unfinished.parent)
        try:
            yield
        finally:
            # Of what was refused nothing is left; with shards in it, it stays.
            with suppress(OSError):
                unfinished.rmdir()
                unfinished.parent.rmdir()
    finally:
        os.close(handle)


def _lock(handle: int, output: Path) -> None:
    with suppress(ImportError):  # without fcntl there is nothing to lock with
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShearlingError(
                f"{output} is being written by another process; wait for it, or name another "
                "output."
            ) from None
        except OSError:  # a file system without locks
            pass


@contextmanager
def kept_on_a_full_disk(output: Path) -> Generator[None]:
    """Turn a full disk into one sentence: what is finished stays, and the command goes on."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise ShearlingError(
            f"the disk ran full while writing {output}; what is finished is kept, so free some "
            "space and give the same command again."
        ) from error
