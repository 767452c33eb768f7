"""Progress as people and as log files see it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import shearling.files.terminal as terminal
from shearling.files.terminal import progress_bars


def run() -> None:
    with progress_bars() as listen:
        for done in range(4):
            listen("reading a [rather] long name of a stage: " + "sheep " * 20 + "end", done, 3)
        for done in (1, 2, 2, 2):  # told more than once that it is done
            listen("second", done, 2)
        listen("never finished", 1, 2)
        for done in (1, 2):  # a stage that comes again is a stage of its own
            listen("second", done, 2)


def test_a_log_gets_one_line_a_stage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    run()
    out, err = capsys.readouterr()
    assert out == ""
    long = "reading a [rather] long name of a stage: " + "sheep " * 20 + "end"
    assert err.splitlines() == [f"{long}: done", "second: done", "second: done"]


def test_a_terminal_gets_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=120, _environ={"TERM": "xterm"})
    monkeypatch.setattr(terminal, "stderr", console)
    with progress_bars() as listen:
        listen("writing weights", 3e6, 6e6)
        listen("writing weights", 6e6, 6e6)
        listen("scoring", 2, 3)
    assert "6/6 MB" in shown.getvalue()
    assert "2/3" in shown.getvalue()
    assert ": done" not in shown.getvalue()


def test_an_error_inside_passes(capsys: pytest.CaptureFixture[str]) -> None:
    def count() -> None:
        with progress_bars() as listen:
            listen("counting", 1, 2)
            raise ValueError("sheep")

    with pytest.raises(ValueError, match="sheep"):
        count()
    assert "counting" not in capsys.readouterr().err
