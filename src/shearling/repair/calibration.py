"""Calibration text: windows of real text, and what the source model makes of them for a repair.

Criteria see the windows as they are. A repair, which solves for more numbers than they settle, sees
them together with copies that the source model rewrote in part
(:mod:`shearling.repair.rewritten`) and with sequences that it wrote itself
(:mod:`shearling.repair.written`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shearling.data.bos import TokenWindows
from shearling.data.documents import documents
from shearling.data.text import calibration_windows
from shearling.engine.stream import BlockStream
from shearling.files.progress import Progress, silent
from shearling.model.checkpoint import Checkpoint
from shearling.repair.rewritten import SHARES, rewrite
from shearling.repair.written import write

WRITTEN = 4  # sequences of the model's own for each window


@dataclass(frozen=True, slots=True)
class Calibration:
    """Text, and how it is used.

    Attributes:
        file: .jsonl, .txt or a directory of such.
        samples, length: windows of text, and tokens in each.
        seed: of every random choice.
        shares: the repair also sees copies of the windows in which the source model rewrote these
            shares of the tokens; none with an empty tuple.
        written: and so many sequences that the source model writes itself; four for each window
            with None.
        bos: whether windows, and what the model writes, begin with BOS; None follows the tokenizer.
    """

    file: Path
    samples: int = 64
    length: int = 256
    seed: int = 0
    shares: tuple[float, ...] = SHARES
    written: int | None = None
    bos: bool | None = None

    @property
    def sequences(self) -> int:
        """How many sequences the source model writes."""
        return WRITTEN * self.samples if self.written is None else self.written

    def windows(self, checkpoint: Checkpoint) -> TokenWindows:
        """Tokens (samples, length)."""
        return calibration_windows(
            documents(self.file), checkpoint.tokenizer(),
            samples=self.samples, length=self.length, seed=self.seed, bos=self.bos,
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "file": self.file.name, "samples": self.samples, "length": self.length,
            "seed": self.seed, "rewritten_shares": list(self.shares), "written": self.sequences,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens(Calibration):
    """Calibration windows that are at hand already, from ``file``, which is not read.

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
    progress: Progress = silent,
) -> Tensor:
    """What a repair is solved on: the windows, copies of them, and what the model writes itself.

    A model that is not resident writes nothing: every token would be a walk through all of it.

    Args:
        source: the model.
        calibration: how the text is used.
        windows: its windows.
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
        source, windows, calibration.sequences, words=rewritten.words, seed=seed, progress=progress
    )
    return torch.cat([rewritten.ids_NS, written_NS])
