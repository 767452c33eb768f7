"""Calibration text: windows of real text, and what the source model makes of them for a repair.

Criteria see the windows as they are. A repair, which solves for more numbers than they settle, sees
them together with copies that the source model rewrote in part
(:mod:`shearling.repair.rewritten`) and with sequences that it wrote itself
(:mod:`shearling.repair.written`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shearling.data.bos import TokenWindows
from shearling.data.calibration import Drawing, all_documents, mixed_windows, origins
from shearling.data.sources import TextSource, described_sources
from shearling.engine.stream import BlockStream
from shearling.files.progress import Progress, silent
from shearling.model.checkpoint import Checkpoint
from shearling.repair.openings import Openings, WrittenFrom, openings_of
from shearling.repair.rewritten import SHARES, rewrite
from shearling.repair.written import write

WRITTEN = 4  # sequences of the model's own for each window


@dataclass(frozen=True, slots=True)
class Calibration:
    """Text, and how it is used.

    Attributes:
        sources: where it lies, each with a share; one of them or several.
        samples, length: windows of text, and tokens in each.
        seed: of every random choice.
        shares: the repair also sees copies of the windows in which the source model rewrote these
            shares of the tokens; none with an empty tuple.
        written: and so many sequences that the source model writes itself; four for each window
            with None.
        bos: whether windows, and what the model writes, begin with BOS; None follows the tokenizer.
        written_from: what the model writes begins with tokens of the text, behind its chat
            template, or half of it each.
    """

    sources: tuple[TextSource, ...]
    samples: int = 64
    length: int = 256
    seed: int = 0
    shares: tuple[float, ...] = SHARES
    written: int | None = None
    bos: bool | None = None
    written_from: WrittenFrom = "text"

    @property
    def sequences(self) -> int:
        """How many sequences the source model writes."""
        return WRITTEN * self.samples if self.written is None else self.written

    @property
    def origins(self) -> tuple[int, ...]:
        """The number of the source that each window is of."""
        return origins(self.sources, self.samples, self.seed)

    def windows(self, checkpoint: Checkpoint) -> TokenWindows:
        """Tokens (samples, length)."""
        drawing = Drawing(
            samples=self.samples, length=self.length, seed=self.seed, bos=self.bos
        )  # fmt: skip
        return mixed_windows(self.sources, checkpoint.tokenizer(), drawing)

    def documents(self, checkpoint: Checkpoint) -> list[str]:
        """All documents of all sources, conversations as the model's template has them."""
        return all_documents(self.sources, checkpoint.tokenizer(), bos=self.bos)

    def openings(self, checkpoint: Checkpoint) -> Openings | None:
        """What sequences that the model writes begin with; None where it is the text alone.

        Raises:
            ShearlingError: they are to begin behind the chat template, and there is none.
        """
        if self.written_from == "text" or not self.sequences:
            return None
        return openings_of(
            self.sources, checkpoint.tokenizer(), self.sequences, self.length,
            seed=self.seed, bos=self.bos, every=self.written_from == "template",
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """For the manifest."""
        written = {} if self.written_from == "text" else {"written_from": self.written_from}
        return described_sources(self.sources, self.samples) | {
            "samples": self.samples, "length": self.length, "seed": self.seed,
            "rewritten_shares": list(self.shares), "written": self.sequences, **written,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens(Calibration):
    """Calibration windows that are at hand already, from a source that is not read.

    Attributes:
        tokens: (samples, length).
    """

    tokens: TokenWindows

    def windows(self, checkpoint: Checkpoint) -> TokenWindows:
        """Tokens (samples, length)."""
        return self.tokens


def repair_text(
    source: BlockStream,
    calibration: Calibration,
    windows: TokenWindows,
    *,
    openings: Openings | None = None,
    progress: Progress = silent,
) -> Tensor:
    """What a repair is solved on: the windows, copies of them, and what the model writes itself.

    A model that is not resident writes nothing: every token would be a walk through all of it.

    Args:
        source: the model.
        calibration: how the text is used.
        windows: its windows.
        openings: what some of the written sequences begin with.
        progress: told how far the work is.

    Returns:
        Tokens (sequences, length); the windows come first, and what is some multiple of
        ``calibration.samples`` behind a window derives from it.
    """
    seed, ids_NS = calibration.seed, windows.ids_NS
    rewritten = rewrite(source, ids_NS, shares=calibration.shares, seed=seed, progress=progress)
    if source.place.weights != "resident":
        return rewritten.ids_NS
    written_NS = write(
        source, windows, calibration.sequences, words=rewritten.words, seed=seed,
        openings=openings, progress=progress,
    )  # fmt: skip
    return torch.cat([rewritten.ids_NS, written_NS])
