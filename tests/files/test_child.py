"""A process at the other end of a pipe, started as it is for users: spawned."""

from __future__ import annotations

import multiprocessing
import os
import signal
from typing import Any

import pytest

import processes
from shearling.errors import ShearlingError
from shearling.files import child
from shearling.files.child import Child


def serve(connection: Any, greeting: str) -> None:
    """In the new process: say what it is, then give messages back until one is to die of."""
    blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    connection.send((greeting, os.getpid(), blocked))
    while (message := connection.recv()) != "die":
        connection.send(message)
    os._exit(7)


def test_a_child_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers, never sees Ctrl-C, and its end is told to who waits and to who asks."""
    others = set(multiprocessing.active_children())
    monkeypatch.setattr(child, "_context", processes.STARTS_AS_USERS)
    assert child._context().get_start_method() == "spawn"
    answering = Child(serve, "baa", died=lambda code: f"it ended with {code}")
    greeting, pid, blocked = answering.receive()
    assert (greeting, pid, blocked) == ("baa", answering.pid, True)
    os.kill(pid, signal.SIGINT)
    answering.send({"wool": [1, 2]})
    assert answering.receive() == {"wool": [1, 2]}
    answering.send("die")
    with pytest.raises(ShearlingError, match="it ended with 7"):
        answering.receive()
    with pytest.raises(ShearlingError, match="it ended with 7"):
        answering.send("more")
    answering.close()
    assert set(multiprocessing.active_children()) <= others
