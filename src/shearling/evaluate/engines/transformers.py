"""transformers as an engine: each model in a process of its own, told what to do over a pipe.

Legend: B batch, P prompt tokens.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from shearling.errors import ShearlingError, reason
from shearling.evaluate.engines.base import (
    ITEMSIZE,
    Candidate,
    Cell,
    Engine,
    Setting,
    Timing,
    cache_bytes,
)
from shearling.evaluate.engines.memory import own_peak, restart_own_peak
from shearling.files.child import Child
from shearling.model.loading import load_model

SLICE = 8  # steps of decoding in a turn
_PROCESS_BYTES = 500_000_000  # Python with torch and transformers, before any model


class Transformers(Engine):
    """Stock transformers, decoding greedily without the overhead of ``generate()``."""

    name = "transformers"
    version = transformers.__version__

    @contextmanager
    def open(
        self, candidates: Sequence[Candidate], setting: Setting
    ) -> Generator[Sequence[ModelProcess]]:
        """Start the processes, and wait until each has loaded its model."""
        with ExitStack() as stack:
            workers = [stack.enter_context(ModelProcess(one, setting)) for one in candidates]
            for worker in workers:
                worker.threads = worker.receive()
            yield workers

    def bytes(self, candidate: Candidate, setting: Setting) -> int:
        """Weights and KV cache; on CPU the libraries too."""
        size = ITEMSIZE[setting.dtype]
        model = candidate.weight_bytes(size) + cache_bytes(candidate, setting.cells, size)
        return model + (_PROCESS_BYTES if setting.device == "cpu" else 0)


@dataclass(frozen=True)
class Prefill:
    """Run a prompt; ``fresh`` starts the peak memory anew."""

    batch: int
    prompt: int
    fresh: bool


@dataclass(frozen=True)
class Decode:
    """Run so many steps after it."""

    steps: int


@dataclass(frozen=True)
class Taken:
    """A job's seconds, and the peak since the last fresh one."""

    seconds: float
    peak_bytes: int


class ModelProcess:
    """A process that holds one model and runs one job at a time; idle, it waits in a read."""

    threads: int | None = None

    def __init__(self, candidate: Candidate, setting: Setting) -> None:
        """Start it; it says how many threads it uses once it has loaded the model."""
        self.candidate = candidate
        self.weights = setting.dtype
        self.child = Child(
            _serve, candidate, setting,
            died=lambda code: (
                f"The process that timed the model in {candidate.path} ended with exit code {code};"
                " if memory ran out (code -9), give smaller batches, bfloat16, or a larger machine."
            ),
        )  # fmt: skip

    def __enter__(self) -> ModelProcess:
        """Nothing more: it runs already."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it, whatever it does."""
        self.child.close()

    def parts(self, cell: Cell, *, fresh: bool) -> Generator[None, None, Timing]:
        """The prompt, then ``SLICE`` steps at a time."""
        prefilled: Taken = self.run(Prefill(cell.batch, cell.prompt, fresh))
        turns, peak = [], prefilled.peak_bytes
        for first in range(0, cell.new, SLICE):
            yield
            taken: Taken = self.run(Decode(min(SLICE, cell.new - first)))
            turns.append(taken.seconds)
            peak = taken.peak_bytes
        return Timing(prefilled.seconds, sum(turns), cell.new, peak, tuple(turns))

    def run(self, job: Prefill | Decode) -> Taken:
        """Have one job done."""
        self.child.send(job)
        return self.receive()

    def receive(self) -> Any:
        """The worker's next answer: its threads once loaded, then what each job took."""
        answer = self.child.receive()
        if isinstance(answer, str):
            why = answer.rstrip(".")
            raise ShearlingError(f"The model in {self.candidate.path} could not be timed: {why}.")
        return answer


def _serve(connection: Connection, candidate: Candidate, setting: Setting) -> None:
    """The worker's life: load, say so, then answer jobs. A failure is answered as its text."""
    try:
        if setting.threads is not None:
            torch.set_num_threads(setting.threads)
        session = Session(load_model(candidate.path, dtype=setting.dtype, device=setting.device))
        connection.send(torch.get_num_threads())
        while True:
            try:
                job = connection.recv()
            except EOFError:  # the parent is gone
                return
            connection.send(session.run(job))
    except ShearlingError as error:
        connection.send(str(error))
    except Exception as error:
        connection.send(reason(error))


class Session:
    """A model in the midst of a run: the KV cache, and the tokens to feed next."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Nothing is run yet."""
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.ids_B1: Tensor | None = None

    @torch.inference_mode()
    def run(self, job: Prefill | Decode) -> Taken:
        """Do a job, on random tokens that are the same for every model of one vocabulary."""
        device = self.model.device
        if isinstance(job, Prefill):
            if job.fresh:
                _restart_peak(device)
            vocabulary = self.model.config.get_text_config().vocab_size
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(vocabulary, (job.batch, job.prompt), generator=generator)
            ids_BP = ids.to(device)
            self.cache = DynamicCache(config=self.model.config)
            started = _now(device)
            self._step(ids_BP)
        else:
            assert self.ids_B1 is not None, "a prompt comes first"
            started = _now(device)
            for _ in range(job.steps):
                self._step(self.ids_B1)
        return Taken(_now(device) - started, _peak_bytes(device))

    def _step(self, ids_BP: Tensor) -> None:
        output = self.model(ids_BP, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.ids_B1 = output.logits[:, -1:].argmax(dim=-1)


def _now(device: torch.device) -> float:
    """Seconds, once all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _restart_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        restart_own_peak()


def _peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else own_peak()
