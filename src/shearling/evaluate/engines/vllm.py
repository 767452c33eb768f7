"""vLLM as an engine: a server of its own for each model, on loopback, asked one request at a time.

Starting vLLM takes long, hence servers that stay, rather than ``vllm bench`` for every repetition.
"""

from __future__ import annotations

import http.client
import json
import math
import random
import time
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError
from shearling.evaluate.engines.base import (
    ITEMSIZE,
    Candidate,
    Cell,
    Engine,
    Setting,
    Timing,
    cache_bytes,
)
from shearling.evaluate.engines.memory import tree_peak
from shearling.evaluate.engines.vllm_server import (
    VllmServer,
    error_message,
    find_vllm,
    quiet_environment,
    vllm_version,
)
from shearling.model.loading import load_config

_PROCESS_BYTES = 2_000_000_000  # its server, its engine and its worker
_GIB = 2**30


class Vllm(Engine):
    """``vllm serve``, found on the PATH or named; every model is in memory at the same time."""

    name = "vllm"

    def __init__(self, program: Path | None = None) -> None:
        """Find it, and ask its version."""
        self.program = find_vllm(program)
        self.version = vllm_version(self.program)

    @contextmanager
    def open(
        self, candidates: Sequence[Candidate], setting: Setting
    ) -> Generator[Sequence[Server]]:
        """Start the servers one after the other, each ready before the next."""
        if any(cell.new < 2 for cell in setting.cells):
            raise ShearlingError(
                "With vllm the time from the first token to the last is that of decoding; "
                "give --new of at least 2."
            )
        with ExitStack() as stack:
            share = 0.9 / len(candidates)
            yield [
                stack.enter_context(Server(self.program, one, setting, share)) for one in candidates
            ]

    def bytes(self, candidate: Candidate, setting: Setting) -> int:
        """Weights, the KV cache it sets aside, and its processes."""
        weights = candidate.weight_bytes(ITEMSIZE[setting.dtype])
        if setting.device != "cpu":
            return weights + cache_bytes(candidate, setting.cells, ITEMSIZE[setting.dtype])
        return weights + _cache_gib(candidate, setting) * _GIB + _PROCESS_BYTES


class Server(VllmServer):
    """A server that is timed."""

    doing = "time"

    def __init__(self, program: Path, candidate: Candidate, setting: Setting, share: float) -> None:
        """``share`` is that of a GPU's memory which it may take."""
        self.setting = setting
        self.threads: int | None = setting.threads
        self.weights = setting.dtype
        self.vocabulary = load_config(candidate.path).vocab_size
        super().__init__(
            program, candidate, _options(setting, share), _environment(candidate, setting)
        )

    def parts(self, cell: Cell, *, fresh: bool) -> Generator[None, None, Timing]:
        """One request, streamed: tokens of every sequence, and when they came."""
        timing = self._ask(cell)
        yield
        return timing

    def _ask(self, cell: Cell) -> Timing:
        request = self.written(self._request(cell))
        arrived: Counter[int] = Counter()
        started = last = time.perf_counter()
        first = None
        with self.posted(request) as answer:
            for event in _events(answer):
                last = time.perf_counter()
                if "error" in event:
                    raise self.failed(error_message(json.dumps(event).encode()))
                for choice in event.get("choices", ()):
                    arrived[choice["index"]] += len(choice.get("token_ids") or (None,))
                if first is None and len(arrived) == cell.batch:
                    first = last
        first = last if first is None else first
        return self._timing(cell, arrived, first - started, last - first)

    def _timing(self, cell: Cell, arrived: Counter[int], prefill: float, decode: float) -> Timing:
        if sum(arrived.values()) != cell.batch * cell.new:
            raise self.failed(
                f"{sum(arrived.values())} tokens came where {cell.batch * cell.new} were asked for"
            )
        peak = tree_peak(self.process.pid) if self.setting.device == "cpu" else None
        return Timing(prefill, decode, cell.new - 1, peak)

    def _request(self, cell: Cell) -> dict[str, Any]:
        """Random tokens, the same for every model of one vocabulary; no end before the last."""
        draw = random.Random(0)
        prompts = [
            [draw.randrange(self.vocabulary) for _ in range(cell.prompt)] for _ in range(cell.batch)
        ]
        return {
            "prompt": prompts, "max_tokens": cell.new, "temperature": 0, "ignore_eos": True,
            "stream": True, "return_token_ids": True,
        }  # fmt: skip


def _options(setting: Setting, share: float) -> list[str]:
    longest = max(cell.prompt + cell.new for cell in setting.cells)
    options = [
        "--dtype", setting.dtype, "--max-model-len", str(longest),
        "--max-num-seqs", str(max(cell.batch for cell in setting.cells)),
        "--no-enable-prefix-caching",
    ]  # fmt: skip
    if setting.device != "cpu":
        options += ["--gpu-memory-utilization", f"{share:.3f}"]
    return options


def _environment(candidate: Candidate, setting: Setting) -> dict[str, str]:
    """No more memory is set aside than the grid needs."""
    environment = quiet_environment(setting.device)
    if setting.device == "cpu":
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(_cache_gib(candidate, setting))
        if setting.threads is not None:
            environment["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{setting.threads - 1}"
    return environment


def _cache_gib(candidate: Candidate, setting: Setting) -> int:
    """Whole GiB, as vLLM wants them."""
    needed = cache_bytes(candidate, setting.cells, ITEMSIZE[setting.dtype])
    return max(1, math.ceil(1.25 * needed / _GIB))  # it hands out blocks, not tokens


def _events(answer: http.client.HTTPResponse) -> Generator[dict[str, Any]]:
    """The events of a stream, up to its end."""
    for line in answer:
        if line.startswith(b"data:"):
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            yield json.loads(data)
