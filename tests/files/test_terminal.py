"""Progress as people and as log files see it."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.progress import Task
from rich.text import Text

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


@pytest.mark.parametrize("width", [30, 40, 60, 80, 120])
def test_the_time_left_is_shown_at_any_width(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=width, _environ={"TERM": "xterm"})
    bars = terminal.Bars(console)
    bars.add_task("writing calibration text", total=2e9, completed=5e8, amount="500/2,000 MB")
    bars.add_task("scoring", total=3, completed=0, amount="0/3")
    monkeypatch.setattr(Task, "elapsed", 3900.0)
    console.print(bars.make_tasks_table(bars.tasks))
    lines = Text.from_ansi(shown.getvalue()).plain.splitlines()
    assert len(lines) == 2
    first, second = (line.split() for line in lines)
    assert first[-2:] == ["left", "3:15:00"]
    assert "500/2,000" in first
    assert second[-2:] == ["left", "-:--"]
    assert ("1:05:00" in first) == (width >= 60)
    assert ("━" in lines[0]) == (width >= 120)
    assert ("calibration text" in lines[0]) == (width >= 60)
    assert lines[0].startswith("⠋ w" if width > 30 else "⠋ ")


def test_a_log_of_a_long_stage_gets_a_line_a_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: clock.now))
    writing = ((0, 0), (59, 10), (60, 20), (119, 35), (180, 45), (250, 90), (280, 100))
    reading = ((300, 0), (360, 0), (480, 2), (490, 100))
    with progress_bars() as listen:
        for stage, steps in (("writing text", writing), ("reading", reading)):
            for clock.now, done in steps:
                listen(stage, done, 100)
    assert capsys.readouterr().err.splitlines() == [
        "writing text: 20 %, 4 min left", "writing text: 45 %, 4 min left",
        "writing text: 90 %, under 1 min left", "writing text: done",
        "reading: 0 %", "reading: 2 %, 2 h 27 min left", "reading: done",
    ]  # fmt: skip


def test_an_error_inside_passes(capsys: pytest.CaptureFixture[str]) -> None:
    def count() -> None:
        with progress_bars() as listen:
            listen("counting", 1, 2)
            raise ValueError("sheep")

    with pytest.raises(ValueError, match="sheep"):
        count()
    assert "counting" not in capsys.readouterr().err
