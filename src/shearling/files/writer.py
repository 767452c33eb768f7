"""Outputs that appear whole or not at all: write beside, flush to disk, rename."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors.torch import save_file
from torch import Tensor

from shearling.errors import ShearlingError
from shearling.files.json_text import json_text
from shearling.files.locks import lock, owner, still_there
from shearling.files.progress import Progress, silent
from shearling.files.staging import check_regular, make_directory, partial, reserved

_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check_output(output: Path) -> None:
    """Raise ShearlingError if ``output`` is taken, before any work is done."""
    if output.is_dir():
        if output.samefile(os.curdir):  # the rename would leave us, and the shell, in no place
            raise ShearlingError(f"output {output} is the working directory; name a new one in it.")
        if any(output.iterdir()):
            raise ShearlingError(
                f"output directory {output} exists and is not empty; name a new one, or remove it."
            )
    elif output.exists() or output.is_symlink():
        raise ShearlingError(f"output {output} is a file; name a new directory.")


def check_outside(output: Path, source: Path) -> None:
    """Raise ShearlingError if ``output`` lies in a source's directory, before any work is done."""
    if output.resolve().is_relative_to(source.resolve()):
        raise ShearlingError(
            f"output {output} lies inside the source {source}, which is never written to; "
            "name a directory elsewhere."
        )


@contextmanager
def claimed(output: Path) -> Generator[None]:
    """Have a new directory to oneself from before the work until it is made, or the work fails.

    Raises:
        ShearlingError: ``output`` is taken, another process makes it, or it cannot be written.
    """
    check_output(output)
    with reserved(output.resolve()):
        yield


def check_space(output: Path, needed: int) -> None:
    """Raise ShearlingError if the file system of ``output`` lacks ``needed`` bytes."""
    existing = next(parent for parent in output.resolve().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ShearlingError(
            f"{output} needs {needed / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB left; "
            "free some space, or name an output on another disk."
        )


@contextmanager
def new_directory(output: Path, progress: Progress = silent) -> Generator[Path]:
    """A directory to fill, renamed to ``output`` when the block ends without an error.

    ``progress`` is told the bytes flushed to disk at the end.

    Raises:
        ShearlingError: ``output`` exists and is not empty, another process makes it, it cannot be
            written, or the disk ran full.
    """
    check_output(output)
    output = output.resolve()  # nothing can be renamed to a link
    with reserved(output) as staging:
        with disk_errors(output):
            yield staging
            sync_tree(staging, progress)
            staging.chmod(0o777 & ~_umask())  # until here it was private
            os.replace(staging, output)
        sync(output.parent)  # should this fail, the output is there nevertheless, and whole


def sync_tree(directory: Path, progress: Progress = silent) -> None:
    """Flush a directory with all in it to disk, files readable as the user's umask has them."""
    mask = _umask()
    files = list(directory.rglob("*"))
    sizes = [file.stat().st_size if file.is_file() else 0 for file in files]
    done, total = 0, sum(sizes)
    for file, size in zip(files, sizes, strict=True):
        if file.is_file():
            file.chmod(0o666 & ~mask)  # safetensors makes its files private
        sync(file)
        done += size
        progress("flushing to disk", done, total)
    sync(directory)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, whole or not at all.

    Raises:
        ShearlingError: a number that is not finite; what :func:`write_text` raises.
    """
    write_text(path, json_text(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text``, whole or not at all; parent directories are made.

    Half a surrogate pair, as Python has it in file names that are not UTF-8, is written as JSON
    would escape it.

    Raises:
        ShearlingError: ``path`` is no regular file, or the disk ran full.
    """
    check_regular(path)
    make_directory(path.parent)
    with disk_errors(path), _new_file(path) as (file, staging):
        file.write(text.encode(errors="backslashreplace"))
        file.flush()
        os.fsync(file.fileno())
        os.chmod(staging, 0o666 & ~_umask())
        os.replace(staging, path)


@contextmanager
def _new_file(path: Path) -> Generator[tuple[BinaryIO, Path]]:
    """An empty file beside ``path``, ours alone; who wants the same waits, since it is soon whole.

    A killed process's is taken over.
    """
    staging = partial(path)
    while True:
        handle = os.open(staging, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        if lock(handle, wait=True) is None:  # no locks here: a name of our own
            os.close(handle)
            staging = partial(path.with_name(f"{path.name}-{owner()}-{threading.get_ident()}"))
            handle = os.open(staging, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            break
        if still_there(handle, staging):
            break
        os.close(handle)
    with os.fdopen(handle, "wb") as file:
        try:
            file.truncate()
            yield file, staging
        finally:
            if still_there(handle, staging):
                staging.unlink()


def write_weights(
    directory: Path,
    sizes: Mapping[str, int],
    load: Callable[[list[str]], dict[str, Tensor]],
    *,
    shard_bytes: int,
    progress: Progress = silent,
) -> dict[str, str]:
    """Write tensors as safetensors with at most one shard in memory.

    Args:
        directory: where; nothing is there yet.
        sizes: bytes of every tensor, in the order in which they are to be stored.
        load: gives the tensors of one shard, by name; called once for each.
        shard_bytes: a shard holds at most this, or a single larger tensor.
        progress: told the bytes written.

    Returns:
        File name -> SHA-256 of what was written.
    """
    shards = plan_shards(sizes, shard_bytes)
    done, total = 0, sum(sizes.values())
    weight_map: dict[str, str] = {}
    digests = {}
    # Hashing a shard that is still in the page cache overlaps with writing the next ones.
    with ThreadPoolExecutor(os.cpu_count()) as hasher:
        for number, names in enumerate(shards, 1):
            file = _shard_name(number, len(shards))
            save_file(load(names), directory / file, metadata={"format": "pt"})
            digests[file] = hasher.submit(file_digest, directory / file)
            hasher.submit(begin_sync, directory / file)
            weight_map |= dict.fromkeys(names, file)
            done += sum(sizes[name] for name in names)
            progress("writing weights", done, total)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(directory / "model.safetensors.index.json", index)
        return {file: digest.result() for file, digest in digests.items()}


def order_metadata(file: Path) -> None:
    """Sort what a safetensors file says of itself, which its library writes in another order each
    time; the file keeps its length.
    """
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= length, "the library writes what json does"
        stream.seek(8)
        stream.write(text.ljust(length))


def file_digest(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def plan_shards(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Names per shard, in order, each shard within ``shard_bytes`` if its tensors allow."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


@contextmanager
def disk_errors(output: Path) -> Generator[None]:
    """Turn a full disk into one sentence; whoever staged the output removes it."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise _full(output) from error
    except Exception as error:  # safetensors wraps the system's error in its own
        if type(error).__name__ != "SafetensorError" or "os error" not in str(error):
            raise
        if not any(f"os error {number}" in str(error) for number in _FULL):
            raise
        raise _full(output) from error


def _full(output: Path) -> ShearlingError:
    return ShearlingError(
        f"the disk ran full while writing {output}, of which nothing was left behind; "
        "free some space, or name an output on another disk."
    )


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def begin_sync(file: Path) -> None:
    """Have the system write a file to disk while others work; ``sync`` waits and sees errors."""
    begin = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux only
    if begin is None:
        return
    with file.open("rb") as stream:
        begin(stream.fileno(), ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)


def sync(path: Path) -> None:
    """Flush a file, or a directory's list of names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
