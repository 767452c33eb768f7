"""The prompts to judge on, and answers that were made elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError
from shearling.files.reading import check_size, json_object
from shearling.files.writer import file_digest

FIELDS = ("prompt", "instruction")


@dataclass(frozen=True)
class Prompts:
    """Prompts, each of them once, in the order of the file; ``repeated`` were left out."""

    file: Path
    texts: tuple[str, ...]
    repeated: int

    @property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return file_digest(self.file)


def read_prompts(file: Path, limit: int | None = None) -> Prompts:
    """Read a ``.jsonl`` with ``prompt`` or ``instruction``, or a ``.txt`` with one on each line.

    An ``input`` beside an ``instruction`` is put below it, after an empty line. Empty lines are
    passed over. Judging a prompt twice would count one thing twice.

    Args:
        file: the prompts.
        limit: use the first so many distinct ones.

    Raises:
        ShearlingError: no such file, another kind of file, a line without a prompt, or no prompt.
    """
    if file.suffix == ".txt":
        prompts = [line for _, line in _lines(file)]
    elif file.suffix == ".jsonl":
        prompts = [_prompt(record, where) for where, record in _records(file)]
    else:
        raise ShearlingError(
            f"{file} is neither .jsonl nor .txt; give prompts as JSON lines with a 'prompt', or "
            "as text with one on each line."
        )
    distinct = list(dict.fromkeys(prompts))[:limit]
    if not distinct:
        raise ShearlingError(f"{file} holds no prompt; give at least one.")
    repeated = len(prompts) - len(set(prompts)) if limit is None else 0
    return Prompts(file, tuple(distinct), repeated)


def read_answers(file: Path) -> dict[str, str]:
    """Prompt -> answer, from a ``.jsonl`` with ``prompt`` and ``answer``.

    Raises:
        ShearlingError: no such file, a line without the fields, or two answers to one prompt.
    """
    answers: dict[str, str] = {}
    for where, record in _records(file):
        prompt, answer = _prompt(record, where), record.get("answer")
        if not isinstance(answer, str):
            raise ShearlingError(f"{where} has no 'answer' that is text.")
        if answers.setdefault(prompt, answer) != answer:
            raise ShearlingError(
                f"{where} answers a prompt that has another answer above; keep one."
            )
    return answers


def _prompt(record: dict[str, Any], where: str) -> str:
    name = next((name for name in FIELDS if name in record), None)
    if name is None:
        raise ShearlingError(
            f"{where} has neither a 'prompt' nor an 'instruction'; its fields are "
            f"{', '.join(record)[:200] or 'none'}."
        )
    text, context = record[name], record.get("input") if name == "instruction" else None
    if not isinstance(text, str) or not text.strip():
        raise ShearlingError(f"{where} has a {name!r} that is not text, or is empty.")
    if context is not None and not isinstance(context, str):
        raise ShearlingError(f"{where} has an 'input' that is not text.")
    return f"{text}\n\n{context}" if context else text


def _records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where, and what object, for each line."""
    for where, line in _lines(file):
        yield where, json_object(line, where, "give an object a line")


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """Where, and what text, for each line that is not blank."""
    check_size(file)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ShearlingError(f"{file} cannot be read ({reason}); give a text file.") from error
    # splitlines() would break at characters that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number} of {file}", line.strip()
