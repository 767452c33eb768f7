"""Tasks as a page compares them: one figure of each, with what says how sure it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from shearling.evaluate.results import TaskResult, TaskResults
from shearling.files.results import refuse
from shearling.model.refs import ModelRef
from shearling.report.records.fields import as_number

# Of a task: its name, metric, shots, limit, questions, and the engine that ran the model.
Asked = tuple[str, str, int | None, int | None, int | None, str]


@dataclass(frozen=True)
class TaskFigure:
    """One task as one model was asked it; ``stderr`` is None where nothing says how sure it is.

    ``engine`` is what ran the model: each computes a little differently.
    """

    name: str
    metric: str
    value: float
    stderr: float | None
    shots: int | None
    limit: int | None
    samples: int | None
    engine: str = "transformers"
    data_sha256: str | None = None  # of a file of questions

    @property
    def asked(self) -> Asked:
        """Equal for figures that may be compared with one another."""
        return self.name, self.metric, self.shots, self.limit, self.samples, self.engine


@dataclass(frozen=True)
class Tasks:
    """A suite of tasks, asked of one model."""

    model: ModelRef
    suite: str
    tasks: tuple[TaskFigure, ...]
    created: str
    dtype: str | None = None
    seed: int | None = None


def tasks_of(results: TaskResults, path: Path) -> Tasks:
    """The figures that count, read from ``path``; a task that gave none is left out.

    Raises:
        ShearlingError: a metric is no number.
    """
    engine = results.engine
    figures = [_figure(name, result, engine, path) for name, result in results.tasks.items()]
    known = tuple(one for one in figures if one is not None)
    return Tasks(results.model, results.suite, known, results.created, results.dtype, results.seed)


def _figure(name: str, result: TaskResult, engine: str, path: Path) -> TaskFigure | None:
    """A task by the metric that counts, or None for one that gave no figure."""
    metrics = result.metrics
    metric = result.primary or next(iter(metrics), "acc")
    value = metrics.get(metric)
    if value is None:
        return None
    number = as_number(value)
    if number is None:
        refuse(path, f"tasks.{name}.metrics.{metric}", "a number", value)
    base, _, chosen = metric.partition(",")  # "exact_match,strict-match": a filter of lm-eval's
    error = as_number(metrics.get(f"{base}_stderr,{chosen}" if chosen else f"{base}_stderr"))
    return TaskFigure(
        name=name,
        metric=metric,
        value=number,
        stderr=error if error is not None and math.isfinite(error) else None,
        shots=result.shots,
        limit=result.limit,
        samples=result.samples,
        engine=engine,
        data_sha256=result.data_sha256,
    )
