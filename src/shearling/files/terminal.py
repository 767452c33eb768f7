"""Progress bars and tables on the terminal; all of it on stderr, so that stdout stays clean."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable
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
from rich.table import Column, Table
from rich.text import Text

from shearling.files.progress import Progress as Listener
from shearling.files.progress import first_process, silent

stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False)


_shown: list[Listener] = []  # the listener whose bars are on the terminal
LINE_EVERY = 60  # seconds, of a stage that takes long, where there is no terminal
BAR = 28  # columns
NAMED = 12  # columns of a stage's name, for which the time that has passed gives way


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


class Bars(Progress):
    """Bars in one line each: on a narrow terminal parts give way, the time left as the last.

    First the bar, then the time that has passed; and the stage's name is shortened.
    """

    def __init__(self, console: Console) -> None:
        """Show them on a console that is a terminal."""
        self.shown_on = console
        name = Column(no_wrap=False, overflow="ellipsis", min_width=1)
        self.parts: dict[str, ProgressColumn] = {
            "spinner": SpinnerColumn(finished_text="[green]✓", table_column=_fixed()),
            "name": _NameColumn(table_column=name),
            "bar": BarColumn(bar_width=BAR, table_column=_fixed()),
            "amount": TextColumn("{task.fields[amount]}", table_column=_fixed()),
            "passed": TimeElapsedColumn(table_column=_fixed()),
            "left": TextColumn("left", table_column=_fixed()),
            "time left": TimeLeftColumn(table_column=_fixed()),
        }
        super().__init__(*self.parts.values(), console=console, disable=not console.is_terminal)

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        """The lines, with the parts for which there is room."""
        tasks = list(tasks)
        names = max((len(task.description) for task in tasks), default=0)
        amounts = max((len(task.fields["amount"]) for task in tasks), default=0)
        room = self.shown_on.width - amounts - len("✓ 0:00:00 left 0:00:00  ")
        without = set[str]()
        if room < names + 1 + BAR:
            without.add("bar")
        if room < min(names, NAMED):
            without.add("passed")
        self.columns = tuple(part for name, part in self.parts.items() if name not in without)
        return super().make_tasks_table(tasks)


class _NameColumn(ProgressColumn):
    """What a stage is called, on one line whatever its length."""

    def render(self, task: Task) -> Text:
        return Text(task.description, no_wrap=True, overflow="ellipsis")


def _fixed() -> Column:
    """A column that is not narrowed."""
    return Column(no_wrap=True)


@contextmanager
def progress_bars() -> Generator[Listener]:
    """A listener that shows one bar a stage, with the time elapsed and left.

    On a pipe or in a log file each stage leaves one line when it ends, and one a minute until
    then. Of several processes the first one shows them. Within another, the bars are the
    other's.
    """
    if not first_process():
        yield silent
        return
    if _shown:
        yield _shown[-1]
        return
    bars = Bars(stderr)
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
            line = _line(stage, said[stage] - begun[stage], done, total)
            stderr.print(line, markup=False, soft_wrap=True)

    _shown.append(listen)
    try:
        with bars:
            yield listen
    finally:
        _shown.remove(listen)


def _line(stage: str, elapsed: float, done: float, total: float) -> str:
    """How far a stage is, for a log: ``writing text: 40 %, 3 min left``."""
    share = f"{stage}: {100 * done / total:.0f} %"
    if not done:
        return share
    minutes = round(elapsed * (total - done) / done / 60)
    hours, rest = divmod(minutes, 60)
    left = f"{hours} h {rest} min" if hours else f"{minutes} min" if minutes else "under 1 min"
    return f"{share}, {left} left"


def _amount(done: float, total: float) -> str:
    """Counts as they are, bytes (the only large totals) in MB."""
    return f"{done / 1e6:,.0f}/{total / 1e6:,.0f} MB" if total > 1e6 else f"{done:g}/{total:g}"


__all__ = ["progress_bars", "stderr", "stdout"]
