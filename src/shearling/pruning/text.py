"""The calibration text as users give it, and its defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shearling.data.calibration import check_sources
from shearling.data.sources import TextSource, dealt, settled_sources
from shearling.engine.place import Place, Wish
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.run import repair_need
from shearling.pruning.settle import Notify, tell_ignored
from shearling.repair.calibration import Calibration
from shearling.repair.openings import WrittenFrom, check_written_from, require_template


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationText:
    """The text that criteria and the repair see: a file, or several sources.

    Attributes:
        file: .jsonl with a ``text`` field or with conversations, .txt, or a directory of such.
        sources: in place of it, several with names and shares.
        samples: windows.
        length: tokens in each.
        seed: of every random choice.
        copies: of the windows, in which the source model rewrote some of the tokens, for the
            repair; None makes one, or three if the model is streamed.
        written: sequences for the repair that the source model writes itself; None writes four
            for each window. A streamed model writes none.
        bos: whether windows, and what the model writes, begin with BOS; None follows the tokenizer.
        written_from: what the model writes begins with tokens of the ``text``, behind its chat
            ``template``, or half of it each (``both``).

    Raises:
        ShearlingError: neither a file nor sources are given, or both; sources that do not go
            together; or a ``written_from`` that is none.
    """

    file: Path | None = None
    sources: Sequence[TextSource] = ()
    samples: int = 64
    length: int = 256
    seed: int = 0
    copies: int | None = None
    written: int | None = None
    bos: bool | None = None
    written_from: WrittenFrom = "text"

    def __post_init__(self) -> None:
        """Refuse what cannot be read, before any work."""
        if (self.file is None) == (not self.sources):
            raise ShearlingError(
                "calibration text is a file or several sources; give one of the two."
            )
        check_written_from(self.written_from)
        self.settled_sources  # noqa: B018  (raises)

    @property
    def settled_sources(self) -> tuple[TextSource, ...]:
        """All sources, each with a share."""
        return settled_sources(self.sources if self.file is None else self.file)

    def settled(
        self, source: Checkpoint, wish: Wish, notify: Notify, cuts: int = 1
    ) -> tuple[Calibration, Place]:
        """The same with its defaults filled in, and where the source runs on it for some cuts.

        Raises:
            ShearlingError: text that will not do, as far as its first records show, or a place
                that is not there.
        """
        check_sources(self.settled_sources, source.tokenizer)
        dealt(self.settled_sources, self.samples)
        shares = rewritten_shares(1)
        text = Calibration(
            self.settled_sources, self.samples, self.length, self.seed, shares, self.written,
            self.bos, self.written_from,
        )  # fmt: skip
        place = Place.best(source, wish, repair_need(source, text, cuts))
        copies, written = self.copies, self.written
        streamed = place.weights != "resident"
        if streamed:
            given = {
                "--written": written or None,
                "--written-from": None if self.written_from == "text" else self.written_from,
            }
            tell_ignored(notify, given, "a streamed model writes no text")
            written = 0
        elif self.written_from != "text" and written != 0:
            require_template(source.tokenizer())
        if copies is None:
            copies = 3 if streamed else 1
        return replace(text, shares=rewritten_shares(copies), written=written), place


def rewritten_shares(copies: int) -> tuple[float, ...]:
    """Shares of tokens rewritten in each copy, spread evenly: 0.3, 0.5 and 0.7 for three."""
    if copies < 2:
        return (0.5,) * copies
    return tuple(round(0.3 + 0.4 * i / (copies - 1), 3) for i in range(copies))
