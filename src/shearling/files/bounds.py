"""Calls whose time and memory are bounded, for what others wrote: a template may loop for ever."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TypeVar

import psutil

Result = TypeVar("Result")


class _TooLong(BaseException):
    """Raised inside a call that takes too long; no ``except Exception`` there stops it."""


def bounded(call: Callable[[], Result], *, seconds: float, num_bytes: int) -> Result:
    """What ``call`` gives, if it takes no more than so long and so much further memory.

    Time is taken of Python code, which a template is. Memory is that of the whole process, so
    that other threads should not allocate much meanwhile; where the system has no such limit,
    there is none.

    Raises:
        TimeoutError: it takes longer.
        ValueError: it needs more memory.
    """
    limit = _by_signal if threading.current_thread() is threading.main_thread() else _by_thread
    try:
        with _memory(num_bytes), limit(seconds):
            return call()
    except _TooLong:
        raise TimeoutError(f"it takes longer than {seconds:g} seconds") from None
    except MemoryError:
        raise ValueError(f"it needs more than {num_bytes / 1e6:,.0f} MB of memory") from None


@contextmanager
def _memory(num_bytes: int) -> Generator[None]:
    try:
        import resource
    except ImportError:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    most = psutil.Process().memory_info().vms + num_bytes
    if before[0] != resource.RLIM_INFINITY:
        most = min(most, before[0])
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def _by_signal(seconds: float) -> Generator[None]:
    """The system's alarm, which also ends one long computation with large whole numbers."""

    def late(*_: object) -> NoReturn:
        raise _TooLong

    if not hasattr(signal, "setitimer"):
        with _by_thread(seconds):
            yield
        return
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _by_thread(seconds: float) -> Generator[None]:
    """Another thread that raises in this one: signals arrive in the main thread alone."""
    ours, done, lock = threading.get_ident(), False, threading.Lock()

    def late() -> None:
        with lock:
            if not done:
                to: Any = ctypes.c_ulong(ours)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(to, ctypes.py_object(_TooLong))

    timer = threading.Timer(seconds, late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with suppress(_TooLong), lock:  # what was raised a moment too late is of no account
            done = True
        timer.cancel()
