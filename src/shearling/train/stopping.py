"""SIGTERM: the wish to stop, which a run heeds at the end of a step."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager


@contextmanager
def terminated() -> Generator[Callable[[], bool]]:
    """Whether SIGTERM has come since; a run then ends at a step's end, saved."""
    came = False

    def note(*_: object) -> None:
        nonlocal came
        came = True

    try:
        before = signal.signal(signal.SIGTERM, note)
    except ValueError:  # not the main thread: whoever runs us sees to signals
        yield lambda: False
        return
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGTERM, before)
