"""Speed and memory of models side by side, over a grid of batches and lengths, on any engine."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from shearling.engine.devices import measured_on
from shearling.errors import ShearlingError
from shearling.evaluate.budget import TimeBudget
from shearling.evaluate.engines import (
    Candidate,
    Cell,
    Engine,
    Places,
    Runner,
    Setting,
    Timing,
    engine,
)
from shearling.evaluate.engines.base import candidate_of
from shearling.evaluate.engines.memory import check_memory, needed
from shearling.evaluate.ratios import ratio, spread
from shearling.evaluate.results import Bench, BenchRun, Spread
from shearling.files.progress import Progress, silent
from shearling.model.dtypes import dtype_of
from shearling.model.loading import check_positive, check_threads, load_config, longest_input
from shearling.model.manifest import ref
from shearling.model.subject import OpenedModel, open_subject

STAGE = "timing"
BATCHES, PROMPTS, NEWS, REPEATS = (1, 8), (128,), (64,), 5


@dataclass(frozen=True)
class Measured:
    """All timings of one cell on one engine: of each model, in the order of the rounds."""

    cell: Cell
    timings: list[list[Timing]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a bench runs on every model.

    Attributes:
        engines: of ``transformers``, ``llama.cpp`` and ``vllm``; one after the other.
        places: where the last two are.
        batches, prompts, news: the grid: sequences, prompt tokens, tokens after them.
        repeats: timed rounds; the median, least and most are given.
        dtype: float32, bfloat16, float16 or auto.
        device: a torch device, or auto.
        threads: on CPU; None leaves the engine's own choice.
        budget: seconds for all of it, for which rounds and tokens are left out; None is no bound.
    """

    engines: Sequence[str] = ("transformers",)
    places: Places | None = None
    batches: Sequence[int] = BATCHES
    prompts: Sequence[int] = PROMPTS
    news: Sequence[int] = NEWS
    repeats: int = REPEATS
    dtype: str = "float32"
    device: str = "cpu"
    threads: int | None = None
    budget: float | None = None

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Every place of the grid."""
        return tuple(Cell(*place) for place in product(self.batches, self.prompts, self.news))

    def check(self) -> None:
        """Raise ShearlingError for what cannot be timed, before anything is opened."""
        if not self.engines:
            raise ShearlingError("There is no engine to time with; give at least transformers.")
        for what, values in (("batch size", self.batches), ("prompt length", self.prompts)):
            if not values:
                raise ShearlingError(f"There is no {what} to time; give at least one, such as 1.")
        if not self.news:
            raise ShearlingError(
                "There is nothing to time after the prompt; give a number, such as 64."
            )
        sizes = (("batch", self.batches), ("prompt", self.prompts), ("new", self.news))
        for name, values in sizes:
            for value in values:
                check_positive(**{name: value})
        check_positive(repeats=self.repeats)
        check_threads(self.threads)
        if self.budget is not None and not 0 < self.budget < math.inf:
            raise ShearlingError(f"A budget of {self.budget:g} s was given; give some, such as 90.")
        if self.dtype != "auto":
            dtype_of(self.dtype)


@dataclass(frozen=True)
class BenchPlan:
    """A bench that was checked and can begin; of ``repeats`` rounds in ``budget`` seconds."""

    subjects: Sequence[OpenedModel]
    candidates: Sequence[Candidate]
    engines: Sequence[Engine]
    setting: Setting
    repeats: int
    budget: float | None = None

    def as_json(self) -> dict[str, Any]:
        """What would be timed, and the memory (bytes) that each engine would take."""
        setting = self.setting
        return {
            "models": [_identity(one) | {"parameters": one.parameters} for one in self.candidates],
            "engines": [
                {
                    "engine": one.name,
                    "engine_version": one.version,
                    "bytes": needed(one, self.candidates, setting),
                }
                for one in self.engines
            ],
            "grid": [asdict(cell) for cell in setting.cells],
            "repeats": self.repeats,
            "budget": self.budget,
            "dtype": setting.dtype,
            "device": setting.device,
            "threads": setting.threads,
        }

    def run(self, progress: Progress = silent) -> Bench:
        """Time all of it; what :func:`bench` returns."""
        runs: list[BenchRun] = []
        ratios: list[dict[str, Any]] = []
        cells = self.setting.cells
        whole = None if self.budget is None else TimeBudget(self.budget)
        budgets: list[TimeBudget] = []
        for number, one in enumerate(self.engines):
            if whole is not None:
                budgets.append(TimeBudget(max(whole.left, 1) / (len(self.engines) - number)))
            by = "" if len(self.engines) == 1 else f" with {one.name}"
            progress(f"opening models{by}", 0, 1)
            with one.open(self.candidates, self.setting) as runners:
                progress(f"opening models{by}", 1, 1)
                for measured in measure(
                    runners, cells, self.repeats, stage=f"{STAGE}{by}", progress=progress,
                    budget=budgets[-1] if budgets else None,
                ):  # fmt: skip
                    runs += _runs(one, self.candidates, runners, measured)
                    ratios += _ratios(one, self.subjects, self.candidates, measured)
        setting = self.setting
        used = {"threads": runs[0].threads, "dtype": setting.dtype, "device": setting.device}
        notes = tuple(note for budget in budgets for note in budget.notes)
        return Bench(
            machine=machine() | used, runs=tuple(runs), ratios=tuple(ratios), budget_notes=notes
        )


def bench(
    models: Sequence[str | Path | OpenedModel],
    workload: Workload | None = None,
    *,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Time prefill and decoding of several models, in turns.

    For each cell of the grid every model is warmed up once; then come ``repeats`` rounds, in each
    of which every model is run once. Within a round the models take turns (with transformers every
    8 tokens), and the order is turned round from turn to turn (A B, B A, A B, …), so that what
    else the machine does, and its drift, fall on all alike. Ratios against the first model are
    those within a round.

    Prefill is from the prompt to the first token: one forward over ``prompt`` random tokens that
    fills the KV cache. Decoding is steps of one token each through it, greedy. Both count
    batch × tokens; ``docs/speed.md`` says what each engine times.

    Peak memory, on transformers, is that of the model's whole process since the warm-up began,
    Python and its libraries included: resident set on CPU, allocated by torch on CUDA. Where the
    system cannot restart its count, it is the peak of the process's life. The CUDA path was never
    run.

    Args:
        models: directories, .gguf files, hub ids, or subjects opened from such; one may come twice.
        workload: what is run on each.
        progress: told how far the work is.

    Returns:
        A result of the kind ``bench``, as in docs/files.md.

    Raises:
        ShearlingError: as :func:`plan_bench`, or the process of a model dies.
    """
    return plan_bench(models, workload).run(progress).to_json()


def plan_bench(
    models: Sequence[str | Path | OpenedModel], workload: Workload | None = None
) -> BenchPlan:
    """Check everything that can be checked before a model is loaded.

    Args:
        models: as in :func:`bench`.
        workload: what is run on each.

    Raises:
        ShearlingError: a setting out of range, an engine that is not there, a model that cannot
            be opened, has too few positions or does not fit into memory.
    """
    if not models:
        raise ShearlingError("There is no model to time; give at least one.")
    workload = workload or Workload()
    workload.check()
    subjects = [_opened(model) for model in models]
    candidates = _candidates(models, subjects)
    check_positions(candidates, workload.cells)
    device, dtype = measured_on(
        workload.device, workload.dtype, [one.parameters for one in candidates],
        ours="transformers" in workload.engines,
    )  # fmt: skip
    setting = Setting(dtype, device, workload.threads, workload.cells)
    engines = [engine(name, workload.places) for name in workload.engines]
    for one in engines:
        check_memory(one, candidates, setting)
    return BenchPlan(subjects, candidates, engines, setting, workload.repeats, workload.budget)


def measure(
    runners: Sequence[Runner],
    cells: Sequence[Cell],
    repeats: int,
    *,
    stage: str = STAGE,
    progress: Progress = silent,
    budget: TimeBudget | None = None,
) -> Generator[Measured]:
    """Time every cell: a warm-up of each model, then ``repeats`` rounds, or fewer on a budget."""
    total, done = len(cells) * (1 + repeats) * len(runners), 0
    for number, asked in enumerate(cells):
        if budget is not None and number and budget.spent(asked):
            continue
        share = budget.left / (len(cells) - number) if budget is not None else math.inf
        begun = time.perf_counter()
        progress(stage, done, total)

        def tell(run: int, before: int = done) -> None:
            progress(stage, before + run, total)

        warm = _round(runners, asked if budget is None else budget.probe(asked), 0, tell)
        share -= time.perf_counter() - begun
        cell, rounds = (
            (asked, repeats) if budget is None else budget.fit(asked, repeats, warm, share)
        )
        timings: list[list[Timing]] = [[] for _ in runners]
        for i in range(1, 1 + rounds):
            for taken, timing in zip(timings, _round(runners, cell, i, tell), strict=True):
                taken.append(timing)
        done += (1 + repeats) * len(runners)
        progress(stage, done, total)
        yield Measured(cell, timings)
    if budget is not None:  # cells may have been left out
        progress(stage, total, total)


def _round(
    runners: Sequence[Runner], cell: Cell, i: int, tell: Callable[[int], None] = lambda _: None
) -> list[Timing]:
    """Every model once, in turns; round 0 warms up. Told are the runs of this cell that ended."""
    running = {n: runner.parts(cell, fresh=i == 0) for n, runner in enumerate(runners)}
    timings: dict[int, Timing] = {}
    turn = i
    while running:
        order = sorted(running, reverse=turn % 2 == 1)
        for n in order:
            try:
                next(running[n])
            except StopIteration as end:
                timings[n] = end.value
                del running[n]
                tell(i * len(runners) + len(timings))
        turn += 1
    return [timings[n] for n in range(len(runners))]


def _runs(
    one: Engine, candidates: Sequence[Candidate], runners: Sequence[Runner], measured: Measured
) -> list[BenchRun]:
    """Entries of a bench's ``runs``."""
    cell, runs = measured.cell, []
    for candidate, runner, timings in zip(candidates, runners, measured.timings, strict=True):
        peaks = [t.peak_bytes for t in timings if t.peak_bytes is not None]
        runs.append(
            BenchRun(
                model=ref(candidate),
                engine=one.name,
                engine_version=one.version,
                weights=runner.weights,
                threads=runner.threads,
                batch=cell.batch,
                prompt=cell.prompt,
                new=cell.new,
                repeats=len(timings),
                first_token_ms=_spread(1e3 * t.prefill_seconds for t in timings),
                ms_per_token=_spread(1e3 * t.decode_seconds / t.steps for t in timings),
                prefill_tokens_per_s=_spread(
                    cell.batch * cell.prompt / t.prefill_seconds for t in timings
                ),
                decode_tokens_per_s=_spread(
                    cell.batch * t.steps / t.decode_seconds for t in timings
                ),
                peak_memory_bytes=max(peaks) if peaks else None,
            )
        )
    return runs


def _ratios(
    one: Engine,
    subjects: Sequence[OpenedModel],
    candidates: Sequence[Candidate],
    measured: Measured,
) -> list[dict[str, Any]]:
    """Entries of a bench's ``ratios``: every model but the first against the first."""
    place = {"engine": one.name, "against": _identity(candidates[0])}
    return [
        {"model": _identity(candidates[n])}
        | place
        | ratio(subjects[0], subjects[n], measured.cell, measured.timings[0], measured.timings[n])
        for n in range(1, len(candidates))
    ]


def _spread(values: Iterable[float]) -> Spread:
    return Spread(**spread(values))


def _identity(candidate: Candidate) -> dict[str, str]:
    return {"name": candidate.name, "fingerprint": candidate.fingerprint}


def _opened(model: str | Path | OpenedModel) -> OpenedModel:
    return open_subject(model) if isinstance(model, str | Path) else model


def _candidates(
    models: Sequence[str | Path | OpenedModel], subjects: Sequence[OpenedModel]
) -> list[Candidate]:
    """What engines need of each model; a name that was there before is numbered."""
    candidates: list[Candidate] = []
    names: list[str] = []
    for model, subject in zip(models, subjects, strict=True):
        times = names.count(subject.name) + 1
        names.append(subject.name)
        given = Path(model) if isinstance(model, str | Path) else None
        candidates.append(
            candidate_of(
                subject,
                name=subject.name if times == 1 else f"{subject.name}#{times}",
                gguf=given if given is not None and given.suffix == ".gguf" else None,
            )
        )
    return candidates


def machine() -> dict:
    """What the figures were taken on: processor, cores, memory (bytes), library versions."""
    affinity = getattr(os, "sched_getaffinity", None)
    machine = {
        "cpu": _cpu_name(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def check_positions(candidates: Sequence[Candidate], cells: Sequence[Cell]) -> None:
    """Refuse a grid that is longer than a model's positions (ShearlingError)."""
    longest = max(cells, key=lambda cell: cell.prompt + cell.new)
    for candidate in candidates:
        limit = longest_input(load_config(candidate.path))
        if limit is not None and longest.prompt + longest.new > limit:
            raise ShearlingError(
                f"A prompt of {longest.prompt} tokens and {longest.new} new ones are longer than "
                f"the {limit} positions of the model in {candidate.path}; give a shorter prompt or "
                "fewer new tokens."
            )
