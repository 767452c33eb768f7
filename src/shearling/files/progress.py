"""How long-running verbs say where they are, without knowing who listens."""

from __future__ import annotations

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


def silent(stage: str, done: float, total: float, /) -> None:
    """The default listener: nobody."""
