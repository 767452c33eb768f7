"""Whether a result that is there answers what is asked now: the same questions, computed alike."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shearling.files.writer import file_digest

if TYPE_CHECKING:
    from shearling.evaluate.tasks.suite import Task
    from shearling.report.measured import Load, WantedResults
    from shearling.report.records.quality import TaskFigure, Tasks
    from shearling.report.records.records import TimedRun


def data_digests(tasks: Sequence[Task]) -> dict[str, str | None]:
    """Label -> SHA-256 of the task's file of questions; None for one of lm-eval's."""
    return {
        task.label: file_digest(task.file) if task.file and task.file.is_file() else None
        for task in tasks
    }


def tasks_key(wanted: WantedResults, data: Mapping[str, str | None]) -> list[Any]:
    """What a result of the tasks depends on, the questions in files of the user's included."""
    asked = [
        [one.label, one.model_dump(mode="json", exclude={"file"}), data[one.label]]
        for one in wanted.suite.tasks
    ]
    return [asked, wanted.limit, wanted.seed, wanted.dtype]


def same_tasks(found: Tasks, wanted: WantedResults, data: Mapping[str, str | None]) -> bool:
    """Whether a suite's results hold every task wanted, asked with the same questions and alike."""
    if (found.suite, found.dtype, found.seed) != (wanted.name, wanted.dtype, wanted.seed):
        return False
    figures = {one.name: one for one in found.tasks}
    return all(
        task.label in figures
        and _same_task(figures[task.label], task, wanted.limit, data[task.label])
        for task in wanted.suite.tasks
    )


def _same_task(found: TaskFigure, task: Task, limit: int | None, data: str | None) -> bool:
    return (
        (found.limit, found.data_sha256) == (limit, data)
        and task.shots in (None, found.shots)
        and task.metric in (None, found.metric, found.metric.partition(",")[0])
    )


def all_timed(
    runs: Sequence[TimedRun], everyone: Collection[str], load: Load, wanted: WantedResults
) -> bool:
    """Whether all models, by fingerprint, were timed together as they would be now."""
    threads = _threads(load, wanted.device)
    timed: dict[tuple[str, str], dict[int, set[str]]] = {}
    for run in runs:
        if (
            (run.prompt, run.new) == (load.prompt, load.new)
            and (run.dtype, run.device) == (wanted.dtype, wanted.device)
            and threads in (None, run.threads)
        ):
            batches = timed.setdefault((run.machine, run.created), {})
            batches.setdefault(run.batch, set()).add(run.model.fingerprint)
    return any(
        all(set(everyone) <= batches.get(batch, set()) for batch in load.batches)
        for batches in timed.values()
    )


def _threads(load: Load, device: str) -> int | None:
    """What a benchmark would use; None where that matters to nothing."""
    if load.threads is not None or device != "cpu":
        return load.threads
    from torch import get_num_threads

    return get_num_threads()
