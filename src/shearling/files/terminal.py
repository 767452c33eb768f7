"""Progress bars and tables on the terminal; all of it on stderr, so that stdout stays clean."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from shearling.files.progress import Progress as Listener
from shearling.files.progress import first_process, silent

stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False)


_shown: list[Listener] = []  # the listener whose bars are on the terminal
LINE_EVERY = 30  # seconds, of a stage that takes long, where there is no terminal


class TimeLeftColumn(ProgressColumn):
    """The time left, if the rest takes as long as what is done: from the first step on."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        """As minutes and seconds."""
        return Text(_left(task.elapsed or 0.0, task.completed, task.total or 0.0))


def _left(elapsed: float, done: float, total: float) -> str:
    if not done:
        return "-:--"
    minutes, seconds = divmod(round(elapsed * (total - done) / done), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@contextmanager
def progress_bars() -> Generator[Listener]:
    """A listener that shows one bar a stage, with the time elapsed and left.

    On a pipe or in a log file each stage leaves one line when it ends, and one every half minute
    until then. Of several processes the first one shows them. Within another, the bars are the
    other's.
    """
    if not first_process():
        yield silent
        return
    if _shown:
        yield _shown[-1]
        return
    bars = Progress(
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeLeftColumn(),
        console=stderr,
        disable=not stderr.is_terminal,
    )
    tasks: dict[str, TaskID] = {}
    finished: set[str] = set()
    begun: dict[str, float] = {}
    said: dict[str, float] = {}

    def listen(stage: str, done: float, total: float, /) -> None:
        if stage not in tasks or (stage in finished and done < total):
            tasks[stage] = bars.add_task(stage, total=total, amount="")
            finished.discard(stage)
            begun[stage] = said[stage] = time.monotonic()
        bars.update(tasks[stage], completed=done, total=total, amount=_amount(done, total))
        if done >= total and stage not in finished:
            finished.add(stage)
            if not stderr.is_terminal:
                stderr.print(f"{stage}: done", markup=False, soft_wrap=True)
        elif not stderr.is_terminal and time.monotonic() - said[stage] >= LINE_EVERY:
            said[stage] = time.monotonic()
            left = _left(said[stage] - begun[stage], done, total)
            line = f"{stage}: {_amount(done, total)}, about {left} left"
            stderr.print(line, markup=False, soft_wrap=True)

    _shown.append(listen)
    try:
        with bars:
            yield listen
    finally:
        _shown.remove(listen)


def _amount(done: float, total: float) -> str:
    """Counts as they are, bytes (the only large totals) in MB."""
    return f"{done / 1e6:,.0f}/{total / 1e6:,.0f} MB" if total > 1e6 else f"{done:g}/{total:g}"


__all__ = ["progress_bars", "stderr", "stdout"]
