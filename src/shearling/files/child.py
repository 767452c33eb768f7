"""A process of one's own at the other end of a pipe: a model in it has its memory to itself.

Both the benchmark and the studio run every model so, with what they ask of it in small messages.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from typing import Any

from shearling.errors import ShearlingError


class Child:
    """A started process that runs ``serve(connection, *arguments)`` until it is closed.

    It is spawned, not forked (a forked process would carry its parent's memory and thread pools),
    and never sees Ctrl-C, which is its parent's to handle.
    """

    def __init__(
        self, serve: Callable[..., None], *arguments: Any, died: Callable[[int | None], str]
    ) -> None:
        """Start it.

        Args:
            serve: a function of a module, since it is found by name in the new process.
            arguments: what it is given after its end of the pipe; they are pickled between two
                processes of this machine, never from a file.
            died: the sentence to raise with once it has died, from its exit code.
        """
        context = _context()
        self._connection, theirs = context.Pipe()
        given = (serve, theirs, *arguments)
        self._process = context.Process(target=_serving, args=given, daemon=True)
        self._sending = threading.Lock()  # a stop may come from another thread than a job
        self._died = died
        with _interrupts_blocked():
            self._process.start()
        theirs.close()  # else its end of file would never be seen here

    @property
    def pid(self) -> int | None:
        """The process's id."""
        return self._process.pid

    def send(self, message: Any) -> None:
        """Hand it a message (ShearlingError if it has died)."""
        try:
            with self._sending:
                self._connection.send(message)
        except OSError as error:
            raise self._death() from error

    def receive(self) -> Any:
        """Wait for its next message (ShearlingError if it dies before there is one)."""
        try:
            return self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error

    def kill(self) -> None:
        """End it, whatever it does; who waits for its message hears that it died."""
        self._process.kill()

    def close(self) -> None:
        """End it and let go of it; nobody may wait for a message any more."""
        self._process.kill()
        self._process.join()
        self._process.close()
        self._connection.close()

    def _death(self) -> ShearlingError:
        self._process.join(timeout=10)
        return ShearlingError(self._died(self._process.exitcode))


def _serving(serve: Callable[..., None], connection: Any, *arguments: Any) -> None:
    """The process's life; that its parent is gone, and with it the pipe, is no error to report."""
    with suppress(EOFError, ConnectionError):
        serve(connection, *arguments)


def _context() -> Any:
    """How processes are started; tests start theirs in a way that imports nothing anew."""
    return multiprocessing.get_context("spawn")


@contextmanager
def _interrupts_blocked() -> Generator[None]:
    """A process started here inherits that Ctrl-C is blocked."""
    resource_tracker.ensure_running()  # else the first start of a process would, and unblocks
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
