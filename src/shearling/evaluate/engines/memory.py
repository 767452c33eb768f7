"""Peak memory of this process and of others, and whether what is asked for can fit."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from shearling.errors import ShearlingError
from shearling.evaluate.engines.base import Candidate, Engine, Setting
from shearling.model.memory import free_bytes


def restart_own_peak() -> None:
    """Let this process's peak begin at what is resident now; Linux alone can."""
    try:
        # "5" resets VmHWM to what is resident now: proc_pid_clear_refs(5)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def own_peak() -> int:
    """Bytes resident in this process at the most, since the restart where there was one."""
    peak = high_water("self")
    if peak is not None:
        return peak
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # bytes on macOS, else kB


def high_water(process: int | str) -> int | None:
    """Bytes that were resident in a process at the most; None where the system does not say.

    Not ``wait4``'s ``ru_maxrss``: it begins with what the parent had resident when it forked.
    """
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024  # kB
    except OSError:
        pass
    return None


def resident(process: int) -> int:
    """The peak of another process, or what it holds now, or 0 once it is gone."""
    peak = high_water(process)
    if peak is not None:
        return peak
    try:
        return psutil.Process(process).memory_info().rss
    except psutil.Error:
        return 0


def tree_peak(process: int) -> int:
    """The peaks of a process and all its descendants, added up: at most what they held together."""
    try:
        children = psutil.Process(process).children(recursive=True)
    except psutil.Error:
        return 0
    return resident(process) + sum(resident(child.pid) for child in children)


def needed(engine: Engine, candidates: Sequence[Candidate], setting: Setting) -> int:
    """Bytes that an engine takes at the least: of all models at once, or of the largest."""
    each = [engine.bytes(candidate, setting) for candidate in candidates]
    return sum(each) if engine.resident else max(each)


def check_memory(engine: Engine, candidates: Sequence[Candidate], setting: Setting) -> None:
    """Refuse what cannot fit into the memory that is free.

    Raises:
        ShearlingError: with what is needed at the least, and what there is.
    """
    each = [engine.bytes(candidate, setting) for candidate in candidates]
    least, free = needed(engine, candidates, setting), free_bytes(setting.device)
    if free is None:  # a device whose memory we cannot ask for
        free = free_bytes() or 0
    if least > free:
        largest = candidates[each.index(max(each))]
        who = (
            f"{len(candidates)} models at once" if engine.resident and len(each) > 1
            else largest.name
        )  # fmt: skip
        raise ShearlingError(
            f"Timing {who} with {engine.name} in {setting.dtype} needs at least "
            f"{least / 1e9:,.1f} GB ({max(each) / 1e9:,.1f} GB for {largest.name}), but "
            f"{free / 1e9:,.1f} GB are free; give fewer models, a smaller dtype, smaller batches, "
            "or a larger machine."
        )
