"""``shearling eval``: texts, tasks and repetition of one or several models, measured alike."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shearling.commands.options import Json, Models, Seed, print_result, warn, warn_ignored
from shearling.errors import ShearlingError

if TYPE_CHECKING:
    from shearling.evaluate.tasks.run import TaskRunner
    from shearling.evaluate.tasks.suite import Suite
    from shearling.files.progress import Progress

WINDOW = 512


def evaluate(
    models: Models,
    suite: Annotated[
        str | None, typer.Option(help="shortened, sheared, or a YAML file of texts and tasks.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Perplexity on this text: .jsonl, .txt, or a directory of such; may be repeated."
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-eval, or .jsonl files of questions, separated by commas."),
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question of --tasks.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Ask the first so many questions of each task.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Requests of tasks at a time; default by length.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Run tasks again whose results are in the cache.")
    ] = False,
    degeneration: Annotated[
        bool,
        typer.Option("--degeneration", help="Measure how continuations of each --text repeat."),
    ] = False,
    window: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a window of --text; default 512.")
    ] = None,
    max_windows: Annotated[
        int | None, typer.Option(min=1, help="Use the first so many windows; default all.")
    ] = None,
    bos: Annotated[bool, typer.Option("--bos", help="Put BOS before every window.")] = False,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Also continue this prompt; may be repeated.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens to generate; default 64, with --degeneration 128."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Nucleus sampling.")] = 1.0,
    seed: Seed = 0,
    dtype: Annotated[str, typer.Option(help="What to compute in.")] = "float32",
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    output: Annotated[
        Path | None,
        typer.Option(help="A directory for the results; of several models, one for each in it."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be measured, and run nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity, tasks and repetition of models, and show what they write.

    Tasks are run through lm-eval; their results are kept by the model's fingerprint, so that a run
    that was stopped goes on with the task it was at.
    """
    from shearling.evaluate.tasks.lines import plan_lines, result_lines
    from shearling.files.terminal import progress_bars
    from shearling.model.subject import open_subject

    if output is not None and output.exists() and not output.is_dir():
        raise ShearlingError(f"--output {output} is a file; name a directory.")
    windows = {"window": window or WINDOW, "max_windows": max_windows, "bos": bos}
    sampling = {"temperature": temperature, "top_p": top_p}
    new = {} if max_new_tokens is None else {"new_tokens": max_new_tokens}
    name, wanted = _suite(suite, text or [], tasks, shots, windows, degeneration, sampling | new)
    if wanted.empty:
        raise ShearlingError(
            "There is nothing to measure; give --text FILE, --tasks NAME,… or --suite NAME."
        )
    _warn_of_ignored(text, tasks, wanted, window, max_windows, shots, limit, batch)
    subjects = [open_subject(model) for model in models]
    plan = _Plan(name, wanted, subjects, limit, seed, dtype, device, batch, fresh)
    if dry_run:
        described = plan.describe()
        print_result(described, as_json, plan_lines(described))
        return
    generation = sampling | {"max_new_tokens": max_new_tokens or 64}
    with progress_bars() as progress:
        plan.prepare(progress)
        results = [
            plan.measure(subject, prompt or [], generation, _writer(output, subject, subjects),
                         progress)
            for subject in subjects
        ]  # fmt: skip
    lines = [
        line
        for subject, files in zip(subjects, results, strict=True)
        for line in result_lines(subject.name if len(subjects) > 1 else None, files)
    ]
    print_result(_joined(results), as_json, lines)


@dataclass
class _Plan:
    """What is measured of every model, and how far it is known already."""

    name: str
    suite: Suite
    subjects: Sequence[Any]
    limit: int | None
    seed: int
    dtype: str
    device: str
    batch: int | None
    fresh: bool
    texts: dict[Any, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from shearling.evaluate.measure import memory_needed
        from shearling.evaluate.tasks.run import TaskRunner

        self.bytes = [
            memory_needed(subject, dtype=self.dtype, device=self.device)
            for subject in self.subjects
        ]
        self.tasks: TaskRunner = TaskRunner(
            self.name, self.suite.tasks, limit=self.limit, seed=self.seed, dtype=self.dtype,
            batch=self.batch,
        )  # fmt: skip
        self.recalled = [
            {} if self.fresh else self.tasks.recalled(subject) for subject in self.subjects
        ]

    def describe(self) -> dict[str, Any]:
        """What a run would do."""
        return {
            "suite": self.name,
            **self.suite.model_dump(mode="json"),
            "limit": self.limit,
            "models": [
                {"name": subject.name, "fingerprint": subject.fingerprint, "bytes": size,
                 "cached": sorted(known)}
                for subject, size, known in zip(
                    self.subjects, self.bytes, self.recalled, strict=True
                )
            ],
        }  # fmt: skip

    def prepare(self, progress: Progress) -> None:
        """Read every text and set up every task, before a model is loaded."""
        for source in (*self.suite.texts, *self.suite.degeneration):
            self.documents(source)
        known = set.intersection(*(set(found) for found in self.recalled))
        missing = [t.label for t in self.suite.tasks if t.label not in known]
        if missing:
            self.tasks.check(missing, progress)

    def documents(self, source: Any) -> list[str]:
        """The text a part of the suite names, read once."""
        key = source.hub or source.file
        if key not in self.texts:
            if source.hub:
                from shearling.evaluate.tasks.hub import hub_text

                self.texts[key] = hub_text(source.hub)
            else:
                from shearling.data.text import documents

                self.texts[key] = documents(source.file)
        return self.texts[key]

    def measure(
        self,
        subject: Any,
        prompts: list[str],
        generation: dict[str, Any],
        write: Callable[[str, dict[str, Any]], None],
        progress: Progress,
    ) -> list[dict[str, Any]]:
        """Every file of results of one model, each written as soon as it is there."""
        from shearling.evaluate.measure import evaluate_text, generate_samples, measure_degeneration

        load, found = _Loaded(subject, self.dtype, self.device), []
        for text in self.suite.texts:
            options = {"window": text.window, "max_windows": text.max_windows, "bos": text.bos}
            found.append(
                evaluate_text(
                    subject, *load(), self.documents(text), text.label, progress=progress, **options
                )
            )
            write(f"evaluation-{text.stem}", found[-1])
        if self.suite.tasks:
            found.append(self._run_tasks(subject, load, progress))
            write(f"tasks-{self.name}", found[-1])
        for each in self.suite.degeneration:
            options = each.model_dump(exclude={"file", "hub"}) | {"seed": self.seed}
            found.append(
                measure_degeneration(
                    subject, *load(), self.documents(each), each.label, progress=progress, **options
                )
            )
            how = f"-t{each.temperature:g}" if each.temperature else ""
            write(f"degeneration-{each.stem}{how}", found[-1])
        if prompts:
            samples = generate_samples(
                subject, prompts, model=load()[0], seed=self.seed, progress=progress, **generation
            )
            found.append(samples)
            write("generations", samples)
        return found

    def _run_tasks(self, subject: Any, load: Any, progress: Progress) -> dict[str, Any]:
        known = {} if self.fresh else self.tasks.recalled(subject)
        if known:
            print(
                f"shearling: {len(known)} of {len(self.suite.tasks)} tasks of {subject.name} come "
                "from the cache; --fresh runs them again.",
                file=sys.stderr,
            )
        result = self.tasks.run(subject, load, recalled=known, progress=progress)
        for name, task in result["tasks"].items():
            if task.get("truncated"):
                warn(
                    f"{task['truncated']} requests of {name} are longer than the positions of "
                    f"{subject.name} and lost their beginning."
                )
        return result


class _Loaded:
    """A model and its tokenizer, loaded when they are first asked for."""

    def __init__(self, subject: Any, dtype: str, device: str) -> None:
        self._subject, self._how = subject, {"dtype": dtype, "device": device}
        self._loaded: tuple[Any, Any] | None = None

    def __call__(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from shearling.model.loading import load_model

            tokenizer = self._subject.tokenizer()
            self._loaded = load_model(self._subject.path, **self._how), tokenizer
        return self._loaded


def _suite(
    name: str | None,
    texts: Sequence[Path],
    tasks: str | None,
    shots: int | None,
    windows: dict[str, Any],
    degeneration: bool,
    continuation: dict[str, Any],
) -> tuple[str, Suite]:
    """The suite named, with what options add to it, and the name for both."""
    from shearling.evaluate.tasks.suite import CUSTOM, build_suite, load_suite, merged

    if degeneration and not texts:
        raise ShearlingError("--degeneration continues a text; give it with --text.")
    named = [part.strip() for part in (tasks or "").split(",") if part.strip()]
    options = build_suite(
        texts=[{"file": text} | windows for text in texts],
        tasks=[_task(part, shots) for part in named],
        degeneration=[{"file": text} | continuation for text in texts] if degeneration else [],
    )
    if name is None:
        return CUSTOM, options
    label, suite = load_suite(name)
    return f"{label}+{CUSTOM}" if named else label, merged(suite, options)


def _task(part: str, shots: int | None) -> dict[str, Any]:
    key = "file" if part.endswith(".jsonl") else "name"
    return {key: part, "shots": shots}


def _warn_of_ignored(
    text: Any, tasks: Any, suite: Suite, window: Any, max_windows: Any, shots: Any, limit: Any,
    batch: Any,
) -> None:  # fmt: skip
    if not text:
        given = {"--window": window, "--max-windows": max_windows}
        warn_ignored(given, "they are for --text, and a suite says its own")
    if not tasks:
        warn_ignored({"--shots": shots}, "it is for --tasks, and a suite says its own")
    if not suite.tasks:
        warn_ignored({"--limit": limit, "--batch": batch}, "they are for tasks, and there are none")


def _writer(
    output: Path | None, subject: Any, subjects: Sequence[Any]
) -> Callable[[str, dict[str, Any]], None]:
    """Writes a file of results of one model, if anywhere."""
    from shearling.files.writer import write_json

    place = output
    if output is not None and len(subjects) > 1:
        alike = sum(other.name == subject.name for other in subjects)
        name = subject.name + (f"-{subject.fingerprint[:8]}" if alike > 1 else "")
        place = output / name

    def write(stem: str, result: dict[str, Any]) -> None:
        if place is not None:
            write_json(place / f"{stem}.json", result)

    return write


def _joined(results: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """One file's object if there is one; generations go along with a lone evaluation."""
    files = [file for found in results for file in found]
    if len(results) == 1 and len(files) == 2 and files[1]["kind"] == "generations":
        return files[0] | {"generations": files[1]}
    return files[0] if len(files) == 1 else {"results": files}
