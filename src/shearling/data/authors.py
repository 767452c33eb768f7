"""Who writes text of a model's own: the model in this process, or a server that another runs.

Shapes: B sequences of S tokens.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Protocol

from shearling.engine.place import Place
from shearling.engine.sampling import Writer, sequences_at_once, writing
from shearling.engine.stream import BlockStream
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint


class Author(Protocol):
    """What :class:`shearling.data.own_text.OwnTextRun` has a model write with."""

    @property
    def engine(self) -> str:
        """Its name; another engine rounds otherwise, and draws otherwise."""
        ...

    def check(self, source: Checkpoint) -> None:
        """Refuse, with a ShearlingError, a model that it cannot have write."""
        ...

    def at_once(self, source: Checkpoint, length: int) -> int:
        """How many sequences of so many tokens it writes at a time."""
        ...

    def writing(
        self, source: Checkpoint, length: int, batch: int
    ) -> AbstractContextManager[Writer]:
        """What writes batches of at most so many sequences of S = ``length`` tokens."""
        ...

    def lines(self) -> list[str]:
        """Where it writes, for a user."""
        ...


@dataclass(frozen=True)
class ResidentAuthor:
    """The model in this process.

    Attributes:
        place: where it runs.
    """

    engine: ClassVar[str] = "transformers"

    place: Place

    def check(self, source: Checkpoint) -> None:
        """Refuse a model that is not held in memory as a whole (ShearlingError)."""
        if self.place.weights != "resident":
            raise ShearlingError(
                f"{source.name} takes {source.bytes / 1e9:.1f} GB and is not held in memory here, "
                "but every token that is written takes all of it; free some memory, or try "
                "--dtype bfloat16 or another device."
            )

    def at_once(self, source: Checkpoint, length: int) -> int:
        """As many sequences as memory allows."""
        return sequences_at_once(source, self.place, length)

    def writing(
        self, source: Checkpoint, length: int, batch: int
    ) -> AbstractContextManager[Writer]:
        """The model, opened once for all batches."""
        return writing(BlockStream(source, self.place))

    def lines(self) -> list[str]:
        """What its place says."""
        return self.place.lines()
