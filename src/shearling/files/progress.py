"""How long-running verbs say where they are, and which of several processes says anything."""

from __future__ import annotations

import os
from typing import Protocol


class Progress(Protocol):
    """Called as work advances: ``progress("scoring blocks", 3, 30)``.

    Args:
        stage: what is being done, in a few words; a new stage starts a new bar.
        done: units finished so far, at most ``total``.
        total: units in this stage.
    """

    def __call__(self, stage: str, done: float, total: float, /) -> None:
        """Take note."""
        ...


def first_process() -> bool:
    """Whether this process speaks: alone, or the first of those that torchrun started."""
    return processes() == 1 or os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """How many processes torchrun started; one without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def silent(stage: str, done: float, total: float, /) -> None:
    """The default listener: nobody."""
