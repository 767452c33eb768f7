"""Locks on files and directories that die with their process, and who holds them."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import psutil


def lock(handle: int, *, wait: bool = False) -> bool | None:
    """Lock an opened file or directory against all others, as long as the handle is open.

    The kernel lets go of it when the process ends, however it ends.

    Args:
        handle: what was opened.
        wait: for whoever has it.

    Returns:
        Whether it is ours; None where the system or the file system has no locks.
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def holder(handle: int) -> str:
    """Who holds the lock on what ``handle`` is: ``process 4711``, where the system says so."""
    stat = os.fstat(handle)
    device = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}"
    held: dict[str, str] = {}  # file -> process
    with suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            _, kind, _, _, process, file, *_ = (*line.split(), *[""] * 6)
            if kind == "FLOCK":
                held[file] = process
    # Some file systems give another device there than in stat.
    same = [file for file in held if file.endswith(f":{stat.st_ino}")]
    exact = f"{device}:{stat.st_ino}"
    process = held.get(exact) or (held[same[0]] if len(same) == 1 else "0")
    return f"process {process}" if int(process) > 0 else "another process"


def still_there(handle: int, path: Path) -> bool:
    """Whether a path is what was opened, and not another of its name that came since."""
    try:
        there, ours = path.lstat(), os.fstat(handle)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def owner() -> str:
    """This process as part of a file's name: host, process and when that began."""
    return f"{_host()}-{os.getpid()}-{_begun(os.getpid())}"


def is_dead(named: str) -> bool:
    """Whether the process that :func:`owner` named has ended; of another host nobody can tell."""
    host, process, begun = named.split("-")
    return host == _host() and _begun(int(process)) != int(begun)


def _host() -> str:
    """A machine, and of it the part whose processes we see."""
    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]


def _begun(process: int) -> int | None:
    """When a process began, in a unit of the system's; None if there is none."""
    with suppress(OSError, ValueError, IndexError):
        # After the name, which may hold anything, the 20th value: ticks since the system began.
        said = Path(f"/proc/{process}/stat").read_text(errors="replace")
        return int(said.rpartition(")")[2].split()[19])
    try:
        return int(psutil.Process(process).create_time())
    except psutil.Error:
        return None
