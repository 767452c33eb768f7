"""What an engine is to `shearling bench`: it opens models, and runs one cell of the grid at a time.

A run is cut into parts, so that models can take turns within it: the shorter the turns, the more
alike is what the rest of the machine does to each.
"""

from __future__ import annotations

import subprocess
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shearling.errors import ShearlingError
from shearling.model.subject import OpenedModel
from shearling.table.cost import kv_cache_bytes
from shearling.table.layout import Layout
from shearling.table.values import Shape


@dataclass(frozen=True)
class Candidate:
    """A model to be timed.

    Attributes:
        name: its label, unlike every other's.
        path: its transformers directory.
        fingerprint: names what is derived from it in the cache.
        parameters: tied ones once.
        cache_elements: numbers that the KV cache holds for one token; 0 where unknown.
        gguf: the file it was given as, for engines that run such.
        quantised_bytes: of its weights where they are quantised, and keep their type; else 0.
    """

    name: str
    path: Path
    fingerprint: str
    parameters: int
    cache_elements: int = 0
    gguf: Path | None = None
    quantised_bytes: int = 0

    def weight_bytes(self, itemsize: int) -> int:
        """Memory of its weights, in numbers of ``itemsize`` bytes unless they are quantised."""
        return self.quantised_bytes or self.parameters * itemsize


def candidate_of(
    subject: OpenedModel, *, name: str | None = None, gguf: Path | None = None
) -> Candidate:
    """What engines need to know of an opened model; its name is the directory's by default."""
    return Candidate(
        name=name or subject.name,
        path=Path(subject.path),
        fingerprint=subject.fingerprint,
        parameters=subject.parameters,
        cache_elements=_cache_elements(subject.layout, subject.shape),
        gguf=gguf,
        quantised_bytes=subject.bytes if getattr(subject, "quantization", None) else 0,
    )


def _cache_elements(layout: Layout | None, shape: Shape) -> int:
    """Keys and values of one token; 0 where a model without a table does not give its sizes."""
    known = all(axis in shape for axis in ("layers", "heads", "head_dim"))
    return kv_cache_bytes(layout, shape, 1, itemsize=1) if known else 0


@dataclass(frozen=True)
class Cell:
    """A place in the grid: sequences, and tokens of each."""

    batch: int
    prompt: int
    new: int


@dataclass(frozen=True)
class Setting:
    """How every model is run.

    Attributes:
        dtype: float32, bfloat16 or float16.
        device: a torch device.
        threads: None leaves the engine its own choice.
        cells: the whole grid.
    """

    dtype: str
    device: str
    threads: int | None
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Timing:
    """What one run took.

    Attributes:
        prefill_seconds: from the prompt to the first token.
        decode_seconds: of ``steps`` steps after it, each a token for every sequence.
        peak_bytes: of memory, or None where the engine cannot tell.
        turns: ``decode_seconds`` by turn, where there was more than one.
    """

    prefill_seconds: float
    decode_seconds: float
    steps: int
    peak_bytes: int | None
    turns: tuple[float, ...] = ()


class Runner(Protocol):
    """One model, ready to be timed."""

    @property
    def threads(self) -> int | None:
        """CPU threads it uses, where that is known."""
        ...

    @property
    def weights(self) -> str:
        """What its weights are held in: a dtype, or a file's name."""
        ...

    def parts(self, cell: Cell, *, fresh: bool) -> Generator[None, None, Timing]:
        """Run a cell, yielding wherever another model may have its turn.

        ``fresh`` marks a warm-up, with which the count of peak memory begins anew.
        """
        ...


class Engine(ABC):
    """Something that runs language models.

    Attributes:
        name: as users give it.
        version: of the program or library.
        resident: whether all models are in memory together.
    """

    name: str
    version: str
    resident: bool = True

    @abstractmethod
    def open(
        self, candidates: Sequence[Candidate], setting: Setting
    ) -> AbstractContextManager[Sequence[Runner]]:
        """Runners of the models, in their order; all is ended with the context.

        Raises:
            ShearlingError: a model that the engine cannot load.
        """

    @abstractmethod
    def bytes(self, candidate: Candidate, setting: Setting) -> int:
        """Memory that a model takes at the least: weights, KV cache, the engine itself."""


def version_of(program: Path, working: str, seconds: float) -> subprocess.CompletedProcess[str]:
    """What a program answers to ``--version``; ``working`` says what to name instead of it.

    Raises:
        ShearlingError: it cannot be run, or takes longer.
    """
    try:
        return subprocess.run(
            [str(program), "--version"],
            capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ShearlingError(f"{program} cannot be run ({error}); name {working}.") from error


def tail(text: str) -> str:
    """The last line that says something, of what a program left behind."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else "it said nothing"


def failure(
    engine: str, candidate: Candidate, said: str, code: int | None = None, *, doing: str = "time"
) -> ShearlingError:
    """An engine's failure on a model in one sentence."""
    ended = "" if code is None else f" (exit code {code})"
    return ShearlingError(
        f"{engine} could not {doing} {candidate.name}{ended}: {said}; if memory ran out, give "
        "smaller batches, a smaller dtype or a larger machine."
    )


ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def cache_bytes(candidate: Candidate, cells: Sequence[Cell], itemsize: int) -> int:
    """The largest KV cache of a grid."""
    tokens = max(cell.batch * (cell.prompt + cell.new) for cell in cells)
    return candidate.cache_elements * tokens * itemsize
