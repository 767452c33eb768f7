"""How much room there is on disks for states that wait."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from shearling.errors import ShearlingError
from shearling.files.scratch import SCRATCH, usual

IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")


@dataclass(frozen=True, slots=True)
class Room:
    """A directory on a disk, and the bytes that are free there."""

    directory: Path
    free: int


def roomiest(needed: int) -> Room:
    """The directory with the most room among the usual ones for scratch files.

    ``$SHEARLING_SCRATCH`` is taken if it is set. A file system in memory is not: what lies there
    takes the memory that it was to save.

    Raises:
        ShearlingError: less room than needed wherever it was looked for.
    """
    asked = os.environ.get(SCRATCH)
    rooms = [
        Room(directory, shutil.disk_usage(directory).free)
        for directory in ([Path(asked)] if asked else usual())
        if directory.is_dir()
        and os.access(directory, os.W_OK)
        and (asked or file_system(directory) not in IN_MEMORY)
    ]
    most = max(rooms, key=lambda room: room.free, default=None)
    if most is None or most.free < needed:
        where = f"{most.free / 1e9:.1f} GB are free in {most.directory}" if most else "none has any"
        raise ShearlingError(
            f"states of {needed / 1e9:.1f} GB have to wait on a disk, but {where}; name a "
            f"directory with more room in ${SCRATCH}, or lower --samples or --length."
        )
    return most


def file_system(directory: Path) -> str:
    """The type of the file system that holds a directory, such as ``ext4``; empty if unknown."""
    inside = directory.resolve()
    holders = [
        part for part in psutil.disk_partitions(all=True) if inside.is_relative_to(part.mountpoint)
    ]
    return max(holders, key=lambda part: len(part.mountpoint)).fstype if holders else ""
