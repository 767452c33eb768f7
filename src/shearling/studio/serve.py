"""Opens the models, binds the port, and serves until the user ends it."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from shearling.engine.devices import measured_on
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.model.dtypes import dtype_of
from shearling.model.loading import check_threads
from shearling.model.memory import free_bytes, loaded_bytes
from shearling.model.subject import OpenedModel, open_subject
from shearling.studio.app import application
from shearling.studio.conversation import Conversation, StudioModel
from shearling.studio.guard import is_loopback
from shearling.studio.worker import StudioWorker

PROCESS_BYTES = 400_000_000  # of a process with torch and transformers and no model


@dataclass(frozen=True, slots=True)
class Serving:
    """Where the page is, and how its models run.

    Attributes:
        host, port: where to listen; port 0 takes one that is free.
        together: whether all answer at once, unless the page says otherwise.
        dtype, device: what the models compute in, and where; ``auto`` goes by what is there.
        threads: of torch on CPU, in each process; None leaves torch's own choice.
    """

    host: str = "127.0.0.1"
    port: int = 0
    together: bool = False
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None


def serve(
    models: Sequence[str | Path],
    serving: Serving,
    *,
    ready: Callable[[str], None],
    progress: Progress = silent,
) -> None:
    """Serve the page until interrupted.

    Args:
        models: directories, .gguf files or hub ids; the first is what the others are measured by.
        serving: where and how.
        ready: told the page's address once every model is loaded.
        progress: told of the loading.

    Raises:
        ShearlingError: an address that cannot be used, a model that cannot be opened, loaded or
            held in memory.
    """
    check_threads(serving.threads)
    if serving.dtype != "auto":
        dtype_of(serving.dtype)
    subjects = [open_subject(model) for model in models]
    device, dtype = measured_on(
        serving.device, serving.dtype, [subject.parameters for subject in subjects]
    )
    serving = replace(serving, device=device, dtype=dtype)
    check_memory([subject.path for subject in subjects], dtype, device)
    with ExitStack() as stack:
        listening = stack.enter_context(listen(serving.host, serving.port))
        loaded = _loaded(subjects, serving, stack, progress)
        ready(address(serving.host, listening.getsockname()[1]))
        # The usual way to end, and no failure; uvicorn raises it again once it is done.
        with suppress(KeyboardInterrupt):
            asyncio.run(_until_interrupted(loaded, serving.host, serving.together, listening))


def _loaded(
    subjects: Sequence[OpenedModel], serving: Serving, stack: ExitStack, progress: Progress
) -> list[StudioModel]:
    """The models, each in a process of its own that ``stack`` ends."""
    workers = []
    for subject in subjects:
        worker = StudioWorker(
            subject.path, dtype=serving.dtype, device=serving.device, threads=serving.threads
        )
        stack.callback(worker.close)
        workers.append(worker)
    models = []
    names = distinct([subject.name for subject in subjects])
    for i, (name, subject, worker) in enumerate(zip(names, subjects, workers, strict=True)):
        progress("loading models", i, len(workers))
        models.append(StudioModel(name, subject.parameters, worker.ready(), worker))
    progress("loading models", len(workers), len(workers))
    return models


async def _until_interrupted(
    models: Sequence[StudioModel], host: str, together: bool, listening: socket.socket
) -> None:
    conversation = Conversation(models)
    config = uvicorn.Config(
        application(conversation, host=host, together=together),
        log_level="critical",
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=2,
    )
    try:
        await _Server(config, conversation.stop).serve(sockets=[listening])
    finally:  # a thread that still waits for an answer would keep the loop open
        for model in models:
            model.worker.kill()


class _Server(uvicorn.Server):
    """On Ctrl-C the models stop, so that open answers end by themselves."""

    def __init__(self, config: uvicorn.Config, stop: Callable[[], Any]) -> None:
        super().__init__(config)
        self._stop, self._loop = stop, asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # A signal's handler may run in the midst of anything, a write to a worker included.
        self._loop.call_soon_threadsafe(self._stop)
        super().handle_exit(sig, frame)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, before minutes are spent on loading.

    Raises:
        ShearlingError: no such address, or the port is taken or not allowed.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except socket.gaierror as error:
        raise ShearlingError(
            f"--host {host} is no address of this machine; leave it out, or give one such as "
            "0.0.0.0."
        ) from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ShearlingError(
                f"Port {port} of {host} is taken; end the program that listens there, give another "
                "--port, or --port 0 for one that is free."
            ) from error
        raise ShearlingError(
            f"Nothing can listen on port {port} of {host} ({error.strerror}); give another --port "
            "above 1023, and as --host an address of this machine."
        ) from error


def address(host: str, port: int) -> str:
    """What to open in a browser on this machine."""
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def warning(host: str) -> str | None:
    """What to know of an address that others can reach; None for loopback."""
    if is_loopback(host):
        return None
    return (
        f"--host {host} lets everyone who can reach this machine read the page and run the models; "
        "there is no password"
    )


def distinct(names: Sequence[str]) -> list[str]:
    """Names told apart by a number where they are equal."""
    counts, seen, told = Counter(names), Counter(), []
    for name in names:
        seen[name] += 1
        told.append(f"{name} ({seen[name]})" if counts[name] > 1 else name)
    return told


def check_memory(
    paths: Sequence[Path], dtype: str, device: str = "cpu", available: int | None = None
) -> None:
    """Refuse models that together would not fit, ``available`` bytes being free (else measured).

    Raises:
        ShearlingError: with the estimate.
    """
    needed = sum(PROCESS_BYTES + loaded_bytes(path, dtype_of(dtype)) for path in paths)
    free = free_bytes(device) if available is None else available
    if free is not None and needed > free:
        where = "memory" if device == "cpu" else f"memory on {device}"
        raise ShearlingError(
            f"{len(paths)} models in {dtype} need about {needed / 1e9:.1f} GB, but "
            f"{free / 1e9:.1f} GB of {where} are free; open fewer or smaller models, or give "
            "--dtype bfloat16."
        )
