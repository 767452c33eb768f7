"""A model's fingerprint: one digest of its configuration and of every byte of its tensors.

Two models that differ in one byte anywhere differ in it; how tensors are spread over files, and
what the directory is called, does not change it. It is the SHA-256 of the configuration and, in
the order of names, of every tensor's name, type, shape and the SHA-256 of its bytes.

Every byte is read once, by several threads, and what a file's tensors came to is kept
(:mod:`shearling.files.remembered`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from shearling.errors import ShearlingError
from shearling.files.remembered import keep, recall

FORMAT = 1  # raised when what is kept of a file would mean something else
KEPT = "fingerprints"
PIECE_BYTES = 4 * 2**20

# Tensor name -> type, shape and SHA-256, as one string.
Digests = dict[str, str]


def fingerprint(raw: Mapping[str, Any], files: Mapping[str, Path]) -> str:
    """The fingerprint of a model, as 64 hexadecimal digits.

    Args:
        raw: its config.json.
        files: tensor name -> safetensors file that holds it.

    Raises:
        ShearlingError: a file is truncated or corrupt.
    """
    by_file = tensor_digests(sorted(set(files.values())))
    digest = hashlib.sha256(json.dumps(raw, sort_keys=True).encode())
    for name in sorted(files):
        digest.update(f"{name} {by_file[files[name]][name]}\n".encode())
    return digest.hexdigest()


def tensor_digests(files: list[Path]) -> dict[Path, Digests]:
    """File -> what its tensors are: kept from an earlier time, or read now.

    Raises:
        ShearlingError: a file is truncated or corrupt.
    """
    stats = {file: file.stat() for file in files}
    digests = {file: kept for file in files if (kept := _recall(stats[file])) is not None}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = {
            file: {
                name: (label, pool.submit(_digest, file, start, stop))
                for name, (label, start, stop) in _tensors(file).items()
            }
            for file in files
            if file not in digests
        }
        for file, tensors in running.items():
            digests[file] = {
                name: f"{label} {future.result()}" for name, (label, future) in tensors.items()
            }
            keep(KEPT, FORMAT, file, stats[file], {"tensors": digests[file]})
    return digests


def _tensors(file: Path) -> dict[str, tuple[str, int, int]]:
    """Tensor name -> type and shape, and where its bytes begin and end in the file."""
    try:
        with safe_open(file, "pt"):  # which validates the header
            pass
    except SafetensorError as error:
        raise ShearlingError(
            f"{file} is truncated or corrupt ({error}); fetch or make it again."
        ) from error
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    data = 8 + length
    return {
        name: (
            f"{entry['dtype']} {entry['shape']}",
            data + entry["data_offsets"][0],
            data + entry["data_offsets"][1],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _digest(file: Path, start: int, stop: int) -> str:
    """SHA-256 of a part of a file."""
    digest = hashlib.sha256()
    piece = memoryview(bytearray(min(PIECE_BYTES, max(stop - start, 1))))
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        while start < stop:
            read = stream.readinto(piece[: stop - start])
            if not read:
                raise ShearlingError(f"{file} became shorter while it was read; try again.")
            digest.update(piece[:read])
            start += read
    return digest.hexdigest()


def _recall(stat: os.stat_result) -> Digests | None:
    """What was kept of a file; None if nothing was, or it is damaged."""
    tensors = recall(KEPT, FORMAT, stat).get("tensors")
    whole = isinstance(tensors, dict) and all(isinstance(one, str) for one in tensors.values())
    return tensors if whole else None
