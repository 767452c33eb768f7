"""Figures of two engines are never set against each other."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from shearling.evaluate.results import TaskResult, TaskResults
from shearling.evaluate.tasks.suite import Suite, Task
from shearling.model.refs import ModelRef
from shearling.report import measured
from shearling.report.decide.accuracy import by_task, means
from shearling.report.pages.task_table import _row
from shearling.report.records.quality import Tasks, tasks_of

MODELS = [ModelRef(name=name, fingerprint=name * 64) for name in "ab"]


def asked(model: ModelRef, value: float, **engine: Any) -> Tasks:
    result = TaskResult(metrics={"acc": value, "acc_stderr": 0.01}, primary="acc", samples=9)
    how = {"dtype": "float32", "seed": 0} | engine
    file = TaskResults(model=model, suite="mine", tasks={"flock": result}, **how)
    return tasks_of(TaskResults.from_json(file.to_json(), Path("tasks.json")), Path("tasks.json"))


def test_rows_are_of_one_engine() -> None:
    first, second = MODELS
    records: Any = SimpleNamespace(
        tasks=(
            asked(first, 0.5), asked(first, 0.75, engine="vllm", engine_version="0.32.0"),
            asked(second, 0.25),
        ),
        models=MODELS,
    )  # fmt: skip
    rows = by_task(records)
    assert [(key[-1], sorted(row)) for key, row in rows.items()] == [
        ("transformers", ["a" * 64, "b" * 64]), ("vllm", ["a" * 64]),
    ]  # fmt: skip
    assert {name[0]: one.value for name, one in means(records).items()} == {"a": 0.5, "b": 0.25}
    shown = [str(_row(records, None, key, row)) for key, row in rows.items()]
    assert ["with vllm" in row for row in shown] == [False, True]


def test_what_another_engine_answered_is_asked_again_unless_all_were() -> None:
    first, second = MODELS

    def known(*records: Tasks) -> list[bool]:
        suite = Suite(tasks=(Task(name="flock"),))
        missing: Any = SimpleNamespace(
            wanted=measured.WantedResults("mine", suite),
            _data={"flock": None},
            subjects=MODELS,
            elsewhere=SimpleNamespace(tasks=records),
        )
        subjects: Any = MODELS
        return [measured.Missing._has_tasks(missing, one) for one in subjects]

    ours, theirs = asked(first, 0.5), asked(first, 0.5, engine="vllm")
    assert known() == [False, False]
    assert known(ours) == [True, False]
    assert known(theirs) == [False, False]
    assert known(theirs, asked(second, 0.5, engine="vllm")) == [True, True]
    assert known(ours, asked(second, 0.5, engine="vllm")) == [True, False]
