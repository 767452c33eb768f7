"""Accuracies of several models on the same tasks, and which differences between them mean anything.

A task's interval is the estimate ± 1.96 standard errors. The difference of two models counts where
it exceeds 1.96 √(a² + b²), a and b being their standard errors: since both answered the same
questions their errors go together, and so that limit is on the careful side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shearling.report.records.quality import Asked, TaskFigure
from shearling.report.records.results import Results

Z = 1.96  # standard errors on either side of an estimate that hold 95 %
LOWER_IS_BETTER = ("perplexity", "bits_per_byte", "ppl", "loss")


@dataclass(frozen=True)
class MeanAccuracy:
    """A figure with its standard error, None where that is not known."""

    value: float
    stderr: float | None

    @property
    def margin(self) -> float | None:
        """Half the width of the 95 % interval."""
        return None if self.stderr is None else Z * self.stderr


def is_accuracy(metric: str) -> bool:
    """Whether a metric of lm-eval's is a share of right answers, of which more is better."""
    return not any(word in metric for word in LOWER_IS_BETTER)


def by_task(results: Results) -> dict[Asked, dict[str, TaskFigure]]:
    """Figures that may be compared (same task, metric, shots, questions, engine), by fingerprint.

    Of a task asked twice the newer answers count; records come oldest first.
    """
    table: dict[Asked, dict[str, TaskFigure]] = {}
    for record in results.tasks:
        for task in record.tasks:
            table.setdefault(task.asked, {})[record.model.fingerprint] = task
    return {asked: table[asked] for asked in sorted(table, key=lambda one: (one[0], str(one)))}


def shared_tasks(results: Results) -> list[dict[str, TaskFigure]]:
    """The accuracies that every model with any accuracy has: those a mean may be taken over."""
    rows = [row for asked, row in by_task(results).items() if is_accuracy(asked[1])]
    models = {fingerprint for row in rows for fingerprint in row}
    return [row for row in rows if row.keys() == models]


def means(results: Results) -> dict[str, MeanAccuracy]:
    """The mean accuracy of each model over the tasks that all of them were asked."""
    shared = shared_tasks(results)
    models = shared[0] if shared else {}
    return {fingerprint: mean([row[fingerprint] for row in shared]) for fingerprint in models}


def mean(tasks: Sequence[TaskFigure]) -> MeanAccuracy:
    """Of accuracies on different questions: √(Σ s²) / n is its standard error."""
    errors = [task.stderr for task in tasks if task.stderr is not None]
    known = len(errors) == len(tasks)
    stderr = math.sqrt(sum(error**2 for error in errors)) / len(tasks) if known else None
    return MeanAccuracy(sum(task.value for task in tasks) / len(tasks), stderr)


def beyond_noise(
    before: MeanAccuracy | TaskFigure, after: MeanAccuracy | TaskFigure
) -> bool | None:
    """Whether two figures differ by more than chance explains; None where that is not known."""
    if before.stderr is None or after.stderr is None:
        return False if before.value == after.value else None
    return abs(after.value - before.value) > Z * math.hypot(before.stderr, after.stderr)
