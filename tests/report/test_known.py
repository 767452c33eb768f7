"""What compares keep of earlier results: only those of the same questions, computed alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shearling.evaluate.results import TaskResult, TaskResults
from shearling.evaluate.tasks.suite import load_suite
from shearling.files.writer import file_digest, write_json
from shearling.model.manifest import ref
from shearling.model.subject import open_subject
from shearling.report.measured import Measurement, Missing, WantedResults, gather
from tiny_tokenizer import write_llama


def write_questions(path: Path, first: str) -> None:
    lines = [{"question": f"{first} {i}", "choices": ["a", "b"], "label": 0} for i in range(4)]
    path.write_text("\n".join(map(json.dumps, lines)))


class Asked:
    """One model, a suite with a file of questions, and what is missing of it."""

    def __init__(self, root: Path) -> None:
        self.root, self.place = root, root / "page.results"
        self.subject = open_subject(write_llama(root / "m", layers=1))
        self.questions = root / "flock.jsonl"
        write_questions(self.questions, "How many sheep are in fold")
        self.say("{file: flock.jsonl}")

    def say(self, task: str) -> None:
        (self.root / "mine.yaml").write_text(f"tasks:\n- {task}\n")

    def jobs(self, **wanted: Any) -> list[Measurement]:
        asked = WantedResults(*load_suite(str(self.root / "mine.yaml")), **wanted)
        elsewhere, known = gather([self.subject], []), gather([self.subject], [self.place])
        return Missing([self.subject], asked, self.place, elsewhere, known).jobs()

    def answer(self, file: Path, *, old: bool = False) -> None:
        told: dict[str, Any] = {} if old else {"dtype": "float32", "seed": 0}
        data = None if old else file_digest(self.questions)
        one = TaskResult(metrics={"acc": 1.0}, primary="acc", shots=0, samples=4, data_sha256=data)
        result = TaskResults(model=ref(self.subject), suite="mine", tasks={"flock": one}, **told)
        write_json(file, result.to_json())


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    return Asked(tmp_path)


@pytest.fixture(params=["ours", "another's"])
def answered(asked: Asked, request: pytest.FixtureRequest) -> Asked:
    """The questions were answered once, and lie where we write them or beside the model."""
    [job] = asked.jobs()
    asked.answer(job.file if request.param == "ours" else asked.root / "m.results" / "tasks.json")
    assert asked.jobs() == []
    return asked


def test_other_questions_are_asked(answered: Asked) -> None:
    write_questions(answered.questions, "How many dogs are in fold")
    assert [job.kind for job in answered.jobs()] == ["tasks"]


@pytest.mark.parametrize("wanted", [{"dtype": "bfloat16"}, {"limit": 2}, {"seed": 1}])
def test_questions_asked_otherwise_are_asked(answered: Asked, wanted: dict[str, Any]) -> None:
    assert [job.kind for job in answered.jobs(**wanted)] == ["tasks"]


@pytest.mark.parametrize(
    "task", ["{name: arc_easy}", "{file: flock.jsonl, shots: 2}", "{name: flock}",
             "{file: flock.jsonl, metric: acc_norm}"],
)  # fmt: skip
def test_other_tasks_are_asked(answered: Asked, task: str) -> None:
    answered.say(task)
    assert [job.kind for job in answered.jobs()] == ["tasks"]


def test_what_does_not_say_what_was_asked_is_asked_again(asked: Asked) -> None:
    asked.answer(asked.root / "m.results" / "tasks.json", old=True)
    assert [job.kind for job in asked.jobs()] == ["tasks"]


def test_questions_that_moved_are_the_same(answered: Asked) -> None:
    (answered.root / "there").mkdir()
    answered.questions.rename(answered.root / "there" / "flock.jsonl")
    answered.say("{file: there/flock.jsonl}")
    assert answered.jobs() == []
