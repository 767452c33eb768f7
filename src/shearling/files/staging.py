"""The place beside an output where it is made: one process has it, and the next clears it.

An output ``model`` is made in ``.model.shearling-partial`` and renamed. The directory is locked
while somebody works in it, so that two processes never make one output; what a killed process left
there is removed by the next that has the same output to make.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from errno import ENOTDIR
from pathlib import Path

from shearling.errors import ShearlingError
from shearling.files.locks import holder, is_dead, lock, owner, still_there

LONGEST = 200  # bytes of a name that ours is made of; file systems take 255
_held: dict[tuple[int, Path], Path] = {}  # process and output -> where it is made


def partial(path: Path) -> Path:
    """Where a file or directory lies until it is whole."""
    name = os.fsdecode(os.fsencode(path.name)[:LONGEST])
    return path.with_name(f".{name}.shearling-partial")


@contextmanager
def reserved(output: Path, *, wait: bool = False) -> Generator[Path]:
    """A private empty directory beside ``output``, for this process alone, gone in the end.

    Reserved again within the block, it is the same directory. To find out before hours of work
    whether an output can be written, reserve it before them.

    Args:
        output: a file or directory to be, with all links resolved; parents are made, and removed
            again if nothing comes of it.
        wait: for another process that makes the same output, rather than refusing.

    Raises:
        ShearlingError: another process makes it, or nothing can be written there.
    """
    key = os.getpid(), output
    if key in _held:
        yield _held[key]
        return
    made = make_directory(output.parent)
    try:
        with _writable(output):
            handle, staging = _open(output, wait=wait)
        try:
            _held[key] = staging
            yield staging
        finally:
            del _held[key]
            if handle is None or still_there(handle, staging):  # and not renamed
                shutil.rmtree(staging, ignore_errors=True)
            if handle is not None:
                os.close(handle)
    finally:
        remove_empty(made)


def make_directory(directory: Path) -> list[Path]:
    """Make a directory with its parents; those that were not there, the innermost first.

    Raises:
        ShearlingError: it cannot be made.
    """
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    with _writable(directory):
        directory.mkdir(parents=True, exist_ok=True)
    return missing


def check_file(path: Path) -> None:
    """Refuse what cannot become a file, before any work is done.

    Raises:
        ShearlingError: it is a directory, a device, a pipe or the like; or nothing can be written
            there.
    """
    check_regular(path)
    check_writable(path)


def check_writable(path: Path) -> None:
    """Refuse a place where nothing can be made: not ours, read-only, full.

    Raises:
        ShearlingError: nothing can be written there.
    """
    places = (path.absolute(), *path.absolute().parents)
    existing = next(place for place in places if place.is_dir())
    with _writable(path):
        for place in places[: places.index(existing)][1:]:
            if place.exists() or place.is_symlink():
                raise NotADirectoryError(ENOTDIR, f"{place} is no directory")
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(4096))


def check_regular(path: Path) -> None:
    """Refuse a directory, and what a file would replace though it is none, such as a device.

    Raises:
        ShearlingError: it is such a thing.
    """
    if path.is_dir():
        raise ShearlingError(f"{path} is a directory; name a file.")
    if path.exists() and not path.is_file():
        raise ShearlingError(
            f"{path} is a device, a pipe or the like, and no regular file; name a new file."
        )


def _open(output: Path, *, wait: bool) -> tuple[int | None, Path]:
    """The directory, locked and empty; without a handle where there are no locks."""
    staging = partial(output)
    while True:
        with suppress(FileExistsError):
            staging.mkdir(mode=0o700)
        try:
            handle = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # whoever had it has just let go
            continue
        ours = lock(handle, wait=wait)
        if ours and still_there(handle, staging):
            for left in staging.iterdir():
                _remove(left)
            return handle, staging
        if ours is None:
            os.close(handle)
            with suppress(OSError):
                staging.rmdir()
            return None, _unlocked(staging)
        refusal = None if ours else being_written(output, handle)
        os.close(handle)
        if refusal is not None:
            raise refusal


def _unlocked(staging: Path) -> Path:
    """Without locks, a directory that names its owner; those whose owner died are removed."""
    name = re.compile(re.escape(staging.name) + r"-([0-9a-f]{8}-\d+-\d+)-\w+")
    for path in staging.parent.iterdir():
        owned = name.fullmatch(path.name)
        if owned and is_dead(owned[1]):
            _remove(path)
    return Path(tempfile.mkdtemp(prefix=f"{staging.name}-{owner()}-", dir=staging.parent))


def being_written(output: Path, handle: int) -> ShearlingError:
    """What the second process is told; ``handle`` is of what the first has locked."""
    return ShearlingError(
        f"{output} is being written by {holder(handle)}; wait for it, or name another output."
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def remove_empty(directories: list[Path]) -> None:
    """Remove directories, the innermost first, as far as nothing lies in them."""
    for directory in directories:
        with suppress(OSError):
            directory.rmdir()


@contextmanager
def _writable(output: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise ShearlingError(
            f"{output} cannot be written ({error.strerror or error}); name one in a "
            "directory that is yours and has room."
        ) from error
