"""Both models answer, the judge compares, and what was said is kept line by line."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError
from shearling.evaluate.generation import Sampling
from shearling.evaluate.results import Judgement
from shearling.files.progress import Progress, silent
from shearling.judge.endpoint import EndpointError, Judge
from shearling.judge.kept import KeptLines, KeptVerdict, key_of
from shearling.judge.prompts import Prompts
from shearling.judge.sides import Side
from shearling.judge.tally import Pair, Tally, tally
from shearling.judge.template import DIGEST, Verdict, messages, read_verdict
from shearling.model.manifest import ref, versions

VERDICTS = "verdicts.jsonl"


@dataclass(frozen=True)
class Question:
    """One comparison in one order: ``order`` is ``AB`` where A's answer is shown first."""

    prompt: str
    order: str
    key: str
    messages: list[dict[str, str]]


@dataclass(frozen=True)
class Match:
    """Who answers what.

    Attributes:
        a, b: the two sides.
        prompts: what is asked.
        sampling: of the answers, for the record.
        folder: where answers and verdicts are kept; what is there is not made again.
    """

    a: Side
    b: Side
    prompts: Prompts
    sampling: Sampling
    folder: Path


def expected(a: Side, b: Side, prompts: Prompts) -> dict[str, int]:
    """What a run would have to make: answers of each, and verdicts at most (a dry run).

    Raises:
        ShearlingError: a file of answers lacks one.
    """
    count = len(prompts.texts)
    return {
        "prompts": count,
        "answers_of_a": a.missing(prompts.texts),
        "answers_of_b": b.missing(prompts.texts),
        "verdicts": 2 * count,
    }


def run(
    match: Match, judge: Judge, *, concurrency: int = 4, progress: Progress = silent
) -> dict[str, Any]:
    """Compare both sides on every prompt, both ways round.

    Args:
        match: who answers what.
        judge: who compares.
        concurrency: requests at a time.
        progress: told of answers and verdicts.

    Returns:
        A ``judgement`` as in docs/files.md.

    Raises:
        ShearlingError: a side cannot answer, or the endpoint failed for good; what was said until
            then is kept.
    """
    texts = match.prompts.texts
    for side in (match.a, match.b):  # a file that lacks an answer is found before a model is loaded
        side.missing(texts)
    kept = KeptLines(match.folder / VERDICTS, KeptVerdict)
    judge_name = judge.model
    answers = list(
        zip(match.a.answers(texts, progress), match.b.answers(texts, progress), strict=True)
    )
    questions = {
        (i, order): _question(prompt, order, both, judge.address, judge_name)
        for i, (prompt, both) in enumerate(zip(texts, answers, strict=True))
        if both[0] != both[1]
        for order in ("AB", "BA")
    }
    _ask(list(questions.values()), judge, kept, concurrency, progress)
    pairs = []
    for i, (a, b) in enumerate(answers):
        verdicts = (_verdict(questions.get((i, order)), kept) for order in ("AB", "BA"))
        pairs.append(Pair(*verdicts, identical=a == b))
    return _judgement(match, judge, judge_name, tally(pairs))


def _verdict(question: Question | None, kept: KeptLines) -> Verdict | None:
    """What the judge said; None where it was not asked, or could not be read."""
    line = None if question is None else kept.get(question.key)
    return None if line is None else line["verdict"]


def _judgement(match: Match, judge: Judge, judge_name: str, tallied: Tally) -> dict[str, Any]:
    """The result file."""
    prompts = match.prompts
    return Judgement(
        a=ref(match.a),
        b=ref(match.b),
        judge=judge_name,
        endpoint=judge.host,
        judge_options=judge.options,
        **asdict(tallied),
        prompt_sha256=DIGEST,
        prompts_file={"name": prompts.file.name, "sha256": prompts.digest},
        sampling=asdict(match.sampling),
        versions=versions() | {"openai": version("openai")},
    ).to_json()


def _question(
    prompt: str, order: str, answers: tuple[str, str], address: str, judge: str
) -> Question:
    first, second = answers if order == "AB" else answers[::-1]
    asked = messages(prompt, first, second)
    return Question(prompt, order, key_of(address, judge, asked), asked)


def _ask(
    questions: Sequence[Question],
    judge: Judge,
    kept: KeptLines,
    concurrency: int,
    progress: Progress,
) -> None:
    """Put the questions whose verdict is not kept, several at a time, and keep each verdict.

    Raises:
        ShearlingError: one failed for good; those under way are still heard, no other is begun.
    """
    missing = [question for question in questions if kept.get(question.key) is None]
    stage, done, failure = "verdicts", len(questions) - len(missing), None
    progress(stage, done, len(questions))
    leave = threading.Event()
    with ThreadPoolExecutor(max_workers=concurrency) as pool:
        futures = [pool.submit(_keep, question, judge, kept, leave) for question in missing]
        try:
            for future in as_completed(futures):
                try:
                    done += future.result()
                except EndpointError as error:
                    failure = failure or error
                    leave.set()
                progress(stage, done, len(questions))
        finally:  # after an interrupt or on a full disk as well
            leave.set()
    if failure is not None:
        raise ShearlingError(
            f"The endpoint {judge.host} failed ({failure}): {done} of {len(questions)} verdicts "
            f"are kept in {kept.file}; run the same command again to go on."
        ) from failure


def _keep(question: Question, judge: Judge, kept: KeptLines, leave: threading.Event) -> int:
    """Ask and keep; the number of verdicts, which is 0 once all are to ``leave``."""
    if leave.is_set():
        return 0
    reply = judge.reply(question.messages)
    record = {
        "prompt": question.prompt,
        "order": question.order,
        "verdict": read_verdict(reply),
        "reply": reply,
    }
    kept.add(question.key, record)
    return 1
