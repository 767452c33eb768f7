"""Speed and memory of models side by side, each in a process of its own.

Legend: B batch, P prompt tokens.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from transformers import DynamicCache, PreTrainedModel

from shearling.errors import ShearlingError
from shearling.evaluate.loading import (
    DTYPES,
    check_positive,
    load_config,
    load_model,
    longest_input,
)
from shearling.progress import Progress, silent

STAGE = "timing"


@dataclass(frozen=True)
class _Job:
    """One timed run; ``fresh`` starts the peak memory anew (a warm-up does)."""

    batch: int
    prompt: int
    new: int
    fresh: bool


@dataclass(frozen=True)
class _Timing:
    """What one run took; the peak is that since the last fresh job."""

    prefill_seconds: float
    decode_seconds: float
    peak_bytes: int


def bench(
    models: Sequence[Path | str],
    *,
    batches: Sequence[int] = (1, 8),
    prompt: int = 128,
    new: int = 64,
    repeats: int = 3,
    dtype: str = "float32",
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress = silent,
) -> dict:
    """Time prefill and decoding of several models, alternating between them.

    For each batch size every model is warmed up once; then they take turns (A B A B …) for
    ``repeats`` rounds, so that what else the machine does falls on all alike. Prefill is one
    forward over ``prompt`` random tokens that fills the KV cache; decoding is ``new`` steps of one
    token each through it, greedy, without the overhead of ``generate()``. Both count
    batch × tokens.

    Peak memory is that of the model's whole process since the warm-up began, Python and its
    libraries included: resident set on CPU, allocated by torch on CUDA. Where the system cannot
    restart its count, it is the peak of the process's life. The CUDA path was never run.

    Args:
        models: local model directories.
        prompt, new: tokens.
        repeats: timed runs for each model and batch size; the median, least and most are given.
        threads: of torch on CPU; None leaves torch's own choice.

    Returns:
        ``kind``, ``machine`` and ``runs`` of a ``bench`` as in docs/files.md; each run's ``model``
        is ``{"name": …, "path": …}``. The machine's ``memory_bytes`` is what is installed.

    Raises:
        ShearlingError: a setting out of range, a model that cannot be loaded or has too few
            positions, or whose process dies.
    """
    paths = [Path(model) for model in models]
    _check(paths, batches, prompt, new, repeats, dtype, threads)
    total, done = len(batches) * (1 + repeats) * len(paths), 0
    runs = []
    with ExitStack() as stack:
        workers = [stack.enter_context(_Worker(path, dtype, device, threads)) for path in paths]
        used_threads = [worker.receive() for worker in workers]
        for batch in batches:
            timings: list[list[_Timing]] = [[] for _ in workers]
            for i in range(1 + repeats):
                for worker, taken in zip(workers, timings, strict=True):
                    progress(STAGE, done, total)
                    timing = worker.run(_Job(batch, prompt, new, fresh=i == 0))
                    if i > 0:
                        taken.append(timing)
                    done += 1
            runs += [
                _run(path, batch, prompt, new, taken)
                for path, taken in zip(paths, timings, strict=True)
            ]
        progress(STAGE, done, total)
    used = {"threads": used_threads[0], "dtype": dtype, "device": device}
    return {"kind": "bench", "machine": machine() | used, "runs": runs}


class _Worker:
    """A process that holds one model and runs one job at a time; idle, it waits in a read."""

    def __init__(self, path: Path, dtype: str, device: str, threads: int | None) -> None:
        self.path = path
        # spawn, not fork: a forked process would carry its parent's memory and thread pools.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, path, dtype, device, threads), daemon=True
        )
        self.process.start()
        theirs.close()  # else its end of file would never be seen here

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.connection.close()

    def run(self, job: _Job) -> _Timing:
        try:
            self.connection.send(job)
        except OSError as error:  # it died between two jobs
            raise self._died() from error
        return self.receive()

    def receive(self) -> Any:
        """The worker's next answer: its threads once loaded, then a timing for each job."""
        try:
            answer = self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if isinstance(answer, str):
            raise ShearlingError(f"The model in {self.path} could not be timed: {answer}")
        return answer

    def _died(self) -> ShearlingError:
        self.process.join(timeout=10)
        return ShearlingError(
            f"The process that timed the model in {self.path} ended with exit code "
            f"{self.process.exitcode}; if memory ran out (code -9), give smaller batches, "
            f"bfloat16, or a larger machine."
        )


def _serve(
    connection: Connection, path: Path, dtype: str, device: str, threads: int | None
) -> None:
    """The worker's life: load, say so, then answer jobs. A failure is answered as its text."""
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        model = load_model(path, dtype=dtype, device=device)
        connection.send(torch.get_num_threads())
        while True:
            try:
                job = connection.recv()
            except EOFError:  # the parent is gone
                return
            connection.send(_time(model, job))
    except ShearlingError as error:
        connection.send(str(error))
    except Exception as error:
        connection.send(f"{type(error).__name__}: {' '.join(str(error).split())}")


@torch.inference_mode()
def _time(model: PreTrainedModel, job: _Job) -> _Timing:
    """Run one job on random tokens, the same for every model of one vocabulary."""
    device = model.device
    if job.fresh:
        _restart_peak(device)
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids_BP = torch.randint(vocabulary, (job.batch, job.prompt), generator=generator).to(device)
    cache = DynamicCache(config=model.config)

    started = _now(device)
    output = model(ids_BP, past_key_values=cache, use_cache=True, logits_to_keep=1)
    prefilled = _now(device)
    for _ in range(job.new):
        ids_B1 = output.logits[:, -1:].argmax(dim=-1)
        output = model(ids_B1, past_key_values=cache, use_cache=True, logits_to_keep=1)
    decoded = _now(device)
    return _Timing(prefilled - started, decoded - prefilled, _peak_bytes(device))


def _now(device: torch.device) -> float:
    """Seconds, once all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _restart_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        # "5" resets VmHWM to what is resident now: proc_pid_clear_refs(5)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024  # kB
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, else kB


def _run(path: Path, batch: int, prompt: int, new: int, timings: list[_Timing]) -> dict:
    """One entry of a bench's ``runs``."""
    return {
        "model": {"name": path.resolve().name, "path": str(path)},
        "batch": batch,
        "prompt": prompt,
        "new": new,
        "repeats": len(timings),
        "prefill_tokens_per_s": _spread(batch * prompt / t.prefill_seconds for t in timings),
        "decode_tokens_per_s": _spread(batch * new / t.decode_seconds for t in timings),
        "peak_memory_bytes": max(t.peak_bytes for t in timings),
    }


def _spread(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


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


def _check(
    paths: Sequence[Path],
    batches: Sequence[int],
    prompt: int,
    new: int,
    repeats: int,
    dtype: str,
    threads: int | None,
) -> None:
    """Refuse, before any process starts, what cannot be timed."""
    if not paths:
        raise ShearlingError("There is no model to time; give at least one model directory.")
    if not batches:
        raise ShearlingError("There is no batch size to time; give at least one, such as 1.")
    for batch in batches:
        check_positive(batch=batch)
    check_positive(prompt=prompt, new=new, repeats=repeats, threads=threads)
    if dtype not in DTYPES:
        raise ShearlingError(f"The dtype {dtype!r} is not known here; give {', '.join(DTYPES)}.")
    for path in paths:
        limit = longest_input(load_config(path))
        if limit is not None and prompt + new > limit:
            raise ShearlingError(
                f"A prompt of {prompt} tokens and {new} new ones are longer than the {limit} "
                f"positions of the model in {path}; give a shorter prompt or fewer new tokens."
            )
