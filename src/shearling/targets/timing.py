"""Shapes timed beside their source, in turns, on an engine: what `shearling bench` does."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from shearling.errors import ShearlingError
from shearling.evaluate.engines import Candidate, Cell, Engine, Setting, Timing, engine
from shearling.evaluate.engines.memory import check_memory
from shearling.evaluate.ratios import decode_speedup
from shearling.evaluate.speed import Measured, check_positions, machine, measure
from shearling.files.progress import Progress, silent
from shearling.files.scratch import scratch
from shearling.model.checkpoint import Checkpoint
from shearling.table.cost import kv_cache_bytes
from shearling.table.values import Shape
from shearling.targets.asked import TargetLoad
from shearling.targets.costs import TimedShape
from shearling.targets.shapes import write_random

STAGE = "timing shapes"
MANY = 8  # sequences that one is set against


class Timer(Protocol):
    """Something that times shapes, the source's first of all."""

    @property
    def machine(self) -> dict[str, Any]:
        """What it times on."""
        ...

    def __call__(self, shapes: Sequence[Shape], *, batch: int | None = None) -> list[TimedShape]:
        """The source and each of the shapes; at another batch than the load's, if one is given."""
        ...


class EngineTimer:
    """Times models of random weights with an engine of `shearling bench`."""

    def __init__(self, source: Checkpoint, load: TargetLoad, progress: Progress = silent) -> None:
        """Find the engine.

        Raises:
            ShearlingError: it is not installed, or the load is longer than the model's positions.
        """
        self.source, self.load, self.progress = source, load, progress
        self.engine: Engine = engine(load.engine, load.places)
        check_positions([self._candidate(source.path, source.shape)], [self._cell(None)])

    @property
    def machine(self) -> dict[str, Any]:
        """The machine, the engine and how it runs."""
        load = self.load
        return machine() | {
            "engine": load.engine, "engine_version": self.engine.version, "threads": load.threads,
            "dtype": load.dtype, "device": load.device,
        }  # fmt: skip

    def __call__(self, shapes: Sequence[Shape], *, batch: int | None = None) -> list[TimedShape]:
        """The source and each of the shapes, in turns; in pairs where memory holds no more.

        Another batch than the load's is timed in half as many rounds.
        """
        cell, load = self._cell(batch), self.load
        repeats = load.repeats if batch is None else max(1, load.repeats // 2)
        setting = Setting(load.dtype, load.device, load.threads, (cell,))
        with scratch() as folder:
            source = self._candidate(self.source.path, self.source.shape)
            others = [
                self._written(shape, folder / f"shape-{number}")
                for number, shape in enumerate(shapes)
            ]
            measured = [
                self._measured([source, *group], setting, repeats)
                for group in self._groups(source, others, setting)
            ]
        seconds = [t.decode_seconds / t.steps for one in measured for t in one.timings[0]]
        whole = TimedShape(self.source.shape, statistics.median(seconds))
        beside = [(one.timings[0], timings) for one in measured for timings in one.timings[1:]]
        return [
            whole,
            *(_timed(shape, whole, *of) for shape, of in zip(shapes, beside, strict=True)),
        ]

    def _measured(self, group: list[Candidate], setting: Setting, repeats: int) -> Measured:
        with self.engine.open(group, setting) as runners:
            (measured,) = measure(
                runners, setting.cells, repeats, stage=STAGE, progress=self.progress
            )
        return measured

    def _cell(self, batch: int | None) -> Cell:
        return Cell(batch or self.load.batch, self.load.prompt, self.load.new)

    def _groups(
        self, source: Candidate, others: list[Candidate], setting: Setting
    ) -> list[list[Candidate]]:
        """All at once if they fit into memory, or each alone beside the source."""
        with suppress(ShearlingError):
            check_memory(self.engine, [source, *others], setting)
            return [others]
        for one in others:
            check_memory(self.engine, [source, one], setting)
        return [[one] for one in others]

    def _written(self, shape: Shape, directory: Path) -> Candidate:
        """A model of random weights; for llama.cpp as a file, in which nothing has to be proved."""
        write_random(self.source, shape, directory)
        file = None
        if self.engine.name == "llama.cpp":
            from shearling.evaluate.engines.llama_cpp import OUTTYPES
            from shearling.ship.converter import convert

            file = directory.with_suffix(".gguf")
            convert(Checkpoint.open(directory), file, OUTTYPES[self.load.dtype], file)
        return self._candidate(directory, shape, file)

    def _candidate(self, path: Path, shape: Shape, gguf: Path | None = None) -> Candidate:
        layout = self.source.layout.heaviest(shape)
        return Candidate(
            name=self.source.name if shape == self.source.shape else path.name,
            path=path,
            fingerprint=self.source.fingerprint if shape == self.source.shape else path.name,
            parameters=layout.count(shape),
            cache_elements=kv_cache_bytes(layout, shape, 1, itemsize=1),
            gguf=gguf,
        )


def _timed(
    shape: Shape, whole: TimedShape, before: Sequence[Timing], after: Sequence[Timing]
) -> TimedShape:
    """A shape by how its rounds compare with the source's, whose own scatter less together."""
    speeds = [decode_speedup(a, b) for a, b in zip(before, after, strict=True)]
    speed = statistics.median(speeds)
    return TimedShape(shape, whole.seconds / speed, speed, min(speeds), max(speeds))
