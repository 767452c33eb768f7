"""Multiple choice questions in a local file, as a task of lm-eval's that needs no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError, told
from shearling.files.writer import file_digest

FORM = '{"question": "…", "choices": ["…", "…"], "label": 0}'
METRICS = ("acc", "acc_norm")


def read_questions(path: Path) -> list[dict[str, Any]]:
    """The questions of a .jsonl file: ``question``, ``choices``, ``label`` (an index) a line.

    Blank lines are passed over, and so are further keys.

    Raises:
        ShearlingError: no such file, or one with no questions; for a line that is none, the
            message names the file and the line.
    """
    if not path.is_file():
        raise ShearlingError(
            f"There is no task file {path}; give a .jsonl file with lines like {FORM}."
        )
    questions = []
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    questions.append(_question(line, f"Line {number} of {path}"))
    except UnicodeDecodeError as error:
        raise ShearlingError(
            f"The task file {path} is not UTF-8 ({error.reason}); give text in that encoding."
        ) from error
    if not questions:
        raise ShearlingError(f"The task file {path} has no questions; give lines like {FORM}.")
    return questions


def config(name: str, path: Path, shots: int | None) -> dict[str, Any]:
    """lm-eval's configuration of a file's questions, asked as ARC's are.

    Shots are drawn from the file itself, never the question that is asked.

    Raises:
        ShearlingError: what :func:`read_questions` refuses, or more shots than other questions.
    """
    questions = read_questions(path)
    if shots is not None and shots >= len(questions):
        raise ShearlingError(
            f"{shots} shots of {path} were asked for, but of its {len(questions)} questions only "
            f"{len(questions) - 1} are others than the one asked; ask for fewer shots."
        )

    def dataset(**_: Any) -> Any:
        import datasets

        return {"test": datasets.Dataset.from_list(questions)}

    return {
        "task": name,
        "custom_dataset": dataset,
        "test_split": "test",
        "fewshot_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": " ",
        "num_fewshot": shots or 0,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in METRICS
        ],
        "metadata": {"version": 1.0},
    }


def digest(path: Path) -> str:
    """SHA-256 of a task file."""
    return file_digest(path)


def _question(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ShearlingError(f"{where} is not JSON ({error}); give lines like {FORM}.") from error
    if not isinstance(record, dict):
        raise ShearlingError(f"{where} is not an object; give lines like {FORM}.")
    missing = [key for key in ("question", "choices", "label") if key not in record]
    if missing:
        raise ShearlingError(f"{where} lacks {' and '.join(missing)}; give lines like {FORM}.")
    question, choices, label = record["question"], record["choices"], record["label"]
    if not isinstance(question, str) or not question.strip():
        raise ShearlingError(f"{where} has a question that is no text; give lines like {FORM}.")
    if not (
        isinstance(choices, list)
        and len(choices) > 1
        and all(isinstance(choice, str) and choice.strip() for choice in choices)
    ):
        raise ShearlingError(
            f"{where} has choices that are not a list of two or more texts; give lines like {FORM}."
        )
    if not isinstance(label, int) or isinstance(label, bool):
        raise ShearlingError(
            f"{where} has the label {told(label)}, which is not a whole number; "
            "the first choice is 0."
        )
    if not 0 <= label < len(choices):
        raise ShearlingError(
            f"{where} has the label {label}, but its {len(choices)} choices are numbered 0 to "
            f"{len(choices) - 1}."
        )
    return {"question": question, "choices": choices, "label": label}
