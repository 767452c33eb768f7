"""Work in processes of its own, for tests that kill it or share it among ranks.

A server that has imported everything forks each of them: a new interpreter would take five seconds
to import torch and transformers, a fork takes none. There is one such server for all that a test
process forks, the workers of `pack` included, and who starts it first says what it imports.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from shearling.files import child

_SERVER = multiprocessing.get_context("forkserver")
PRELOADED = "process_work"
# In this order: shearling keeps what others say while they are imported off the terminal.
IMPORTED = ["shearling", PRELOADED, "shearling.studio.worker",
            "shearling.evaluate.engines.transformers"]  # fmt: skip
STARTS_AS_USERS = child._context  # what conftest.py puts `context` in the place of


def serve() -> None:
    """Start the server, unless it runs.

    Python 3.11 does not tell it ``sys.path``, and passes over modules that it does not find:
    without the path in its environment it would import nothing, and every process all.
    """
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    _SERVER.set_forkserver_preload(IMPORTED)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if path is not None:
            os.environ["PYTHONPATH"] = path


def context() -> Any:
    """A context of :mod:`multiprocessing` whose processes the server forks."""
    serve()
    return _SERVER


def started(
    work: Callable[..., None], *arguments: Any, ranks: int = 1, said: Path
) -> list[BaseProcess]:
    """Begin ``work(*arguments)`` in as many processes as there are ranks.

    Args:
        work: a function of a module that can be imported.
        arguments: can be pickled.
        ranks: processes of one group, told so as ``torchrun`` tells them.
        said: a directory for what they write to the standard error, one file a rank.
    """
    serve()
    port = 20000 + (os.getpid() * 7 + int(time.time() * 1000)) % 30000
    said.mkdir(parents=True, exist_ok=True)
    running = []
    for rank in range(ranks):
        environment = {
            "RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{ranks}",
            "LOCAL_WORLD_SIZE": f"{ranks}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}",
        }  # fmt: skip
        process = _SERVER.Process(
            target=_run, args=(work, arguments, environment, str(said / f"rank-{rank}.txt"))
        )
        process.start()
        running.append(process)
    return running


def ended(running: list[BaseProcess], said: Path, *, fails: bool = False) -> list[int]:
    """Wait for processes: their exit codes; an AssertionError with what they said if one failed.

    Args:
        running: from :func:`started`.
        said: the directory given there.
        fails: a failure is what the test wants.
    """
    for process in running:
        process.join(timeout=120)
    codes = [process.exitcode for process in running]
    for process in running:
        process.kill()  # if it still hangs
    if not fails and any(codes):
        texts = [file.read_text()[-2000:] for file in sorted(said.glob("rank-*.txt"))]
        raise AssertionError(f"exit codes {codes}: {texts}")
    return [-1 if code is None else code for code in codes]


def _run(
    work: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str], said: str
) -> None:
    """In the new process."""
    gc.freeze()  # what the server imported is looked through by no collection, nor copied for it
    os.environ.update(environment)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    code = 1
    try:
        assert os.getpid() != sys.modules[PRELOADED].IMPORTED_BY, "the server did not import it"
        work(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # torch 2.13 may abort as Python ends ("terminate called without an active exception").
        os._exit(code)
