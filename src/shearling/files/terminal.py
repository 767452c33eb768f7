"""Progress bars and tables on the terminal; all of it on stderr, so that stdout stays clean."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from shearling.files.progress import Progress as Listener
from shearling.files.progress import first_process, silent

stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False)


@contextmanager
def progress_bars() -> Generator[Listener]:
    """A listener that shows one bar a stage, with the time elapsed and left.

    On a pipe or in a log file each stage leaves one line when it ends. Of several processes the
    first one shows them.
    """
    if not first_process():
        yield silent
        return
    bars = Progress(
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=stderr,
        disable=not stderr.is_terminal,
    )
    tasks: dict[str, TaskID] = {}
    finished: set[str] = set()

    def listen(stage: str, done: float, total: float, /) -> None:
        if stage not in tasks or (stage in finished and done < total):
            tasks[stage] = bars.add_task(stage, total=total, amount="")
            finished.discard(stage)
        bars.update(tasks[stage], completed=done, total=total, amount=_amount(done, total))
        if done >= total and stage not in finished:
            finished.add(stage)
            if not stderr.is_terminal:
                stderr.print(f"{stage}: done", markup=False, soft_wrap=True)

    with bars:
        yield listen


def _amount(done: float, total: float) -> str:
    """Counts as they are, bytes (the only large totals) in MB."""
    return f"{done / 1e6:,.0f}/{total / 1e6:,.0f} MB" if total > 1e6 else f"{done:g}/{total:g}"


__all__ = ["progress_bars", "stderr", "stdout"]
