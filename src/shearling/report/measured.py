"""What a comparison still lacks, and measuring it: every result a file, so that a rerun goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field
from functools import cached_property
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from shearling.data.bos import adds_bos
from shearling.files.progress import Progress, silent
from shearling.files.writer import file_digest, write_json
from shearling.model.loading import check_threads
from shearling.model.subject import OpenedModel
from shearling.report.decide.selection import ComparedModel
from shearling.report.known import all_timed, data_digests, same_tasks, tasks_key
from shearling.report.records.collect import read_directory
from shearling.report.records.records import Records
from shearling.report.records.results import measurements

if TYPE_CHECKING:
    from shearling.evaluate.abilities.measure import Asking
    from shearling.evaluate.tasks.suite import (
        AbilityItems,
        DegenerationText,
        PerplexityText,
        Suite,
    )

ENDINGS = (".jsonl", ".txt", ".md")  # which a report leaves out of a text's name


@dataclass(frozen=True)
class Load:
    """What a short benchmark runs: tokens, and how often (ShearlingError for too many threads)."""

    batches: tuple[int, ...] = (1,)
    prompt: int = 128
    new: int = 32
    repeats: int = 3
    threads: int | None = None

    def __post_init__(self) -> None:
        """Refuse what would be refused only after all that is measured before."""
        check_threads(self.threads)


@dataclass(frozen=True)
class WantedResults:
    """What is asked for of every model.

    Attributes:
        name: of the suite, for results.
        suite: texts, tasks and repetition; a text of ``--text`` is among them.
        limit: questions of each task; None asks all.
        bench: None times nothing.
    """

    name: str
    suite: Suite
    limit: int | None = None
    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 64
    bench: Load | None = None
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"


@dataclass(frozen=True)
class Measurement:
    """One result that is missing; ``subject`` is None for a benchmark, which times all in turns."""

    subject: OpenedModel | None
    kind: str  # evaluation, tasks, abilities, degeneration, generations or bench
    what: str
    file: Path
    item: Any = None

    def as_json(self) -> dict[str, Any]:
        """For ``--dry-run --json``."""
        name = self.subject.name if self.subject is not None else None
        return {"model": name, "kind": self.kind, "what": self.what, "file": str(self.file)}


def gather(subjects: Sequence[OpenedModel], given: Iterable[Path]) -> Records:
    """Read every result about these models that can be found.

    They lie in the model's own directory, in ``MODEL.results`` beside it, and in the directories
    given; one of those that is not there holds none.

    Raises:
        ShearlingError: a result file is damaged.
    """
    records, seen = Records(), set[Path]()
    for subject in subjects:
        path = Path(subject.path)
        beside = path.resolve().parent / f"{path.resolve().name}.results"
        for directory in (path, beside):
            if directory.is_dir():
                read_directory(directory, records, seen)
    for directory in given:
        if directory.is_dir():
            read_directory(directory, records, seen)
    return records


def candidate(subject: OpenedModel, given: str) -> ComparedModel:
    """A model as the page knows it; ``given`` is how the user named it."""
    local = Path(given).exists()
    shape = getattr(subject, "shape", None)
    return ComparedModel(
        name=subject.name,
        fingerprint=subject.fingerprint,
        parameters=getattr(subject, "parameters", None),
        bytes=getattr(subject, "bytes", None),
        shape=dict(shape) if shape else {},
        where=Path(given).resolve().name if local else given,
    )


@dataclass
class Missing:
    """Finds out what is wanted and not there.

    Args:
        place: a directory for results. A file of ours there is known by its name, which holds a
            digest of all that it depends on.
        elsewhere: what others wrote, which is known by what it says of itself.
        known: that, and what lies in ``place``.
    """

    subjects: Sequence[OpenedModel]
    wanted: WantedResults
    place: Path
    elsewhere: Records
    known: Records
    _digests: dict[Path, str] = field(default_factory=dict)
    _adding: dict[str, bool] = field(default_factory=dict)  # BOS, by the model's fingerprint

    def jobs(self) -> list[Measurement]:
        """Everything missing, model by model, the benchmark last."""
        missing = [job for subject in self.subjects for job in self._of(subject)]
        bench = self._bench()
        return [*missing, *([bench] if bench else [])]

    def _of(self, subject: OpenedModel) -> list[Measurement]:
        wanted, missing = self.wanted, []
        for text in (self._settled(subject, text) for text in wanted.suite.texts):
            file = self._file(subject, f"evaluation-{text.stem}", self._key(text))
            if not (file.is_file() or self._has_evaluation(subject, text)):
                windows = f"{text.max_windows} windows" if text.max_windows else "all windows"
                what = f"perplexity on {text.label}, {windows} of {text.window} tokens"
                missing.append(Measurement(subject, "evaluation", what, file, text))
        tasks = wanted.suite.tasks
        file = self._file(subject, f"tasks-{wanted.name}", tasks_key(wanted, self._data))
        if tasks and not (file.is_file() or self._has_tasks(subject)):
            few = f", {wanted.limit} questions each" if wanted.limit else ""
            what = f"{len(tasks)} tasks of {wanted.name}{few}"
            missing.append(Measurement(subject, "tasks", what, file))
        for asked in (self._settled(subject, one) for one in wanted.suite.abilities):
            asking = self._asking(asked)
            file = self._file(subject, "abilities", [*astuple(asking), wanted.dtype])
            if not (file.is_file() or self._has_abilities(subject, asking)):
                few = f", {asking.limit} items of each" if asking.limit else ""
                missing.append(Measurement(subject, "abilities", f"abilities{few}", file, asking))
        for each in (self._settled(subject, text) for text in wanted.suite.degeneration):
            file = self._file(subject, f"degeneration-{each.stem}", self._key(each))
            if not (file.is_file() or self._has_degeneration(subject, each)):
                what = f"repetition in {each.prompts} continuations of {each.label}"
                missing.append(Measurement(subject, "degeneration", what, file, each))
        prompts = [one for one in wanted.prompts if one not in self._said(subject)]
        if prompts:
            key = [prompts, wanted.max_new_tokens, wanted.dtype]
            file = self._file(subject, "generations", key)
            what = f"{len(prompts)} prompts continued by up to {wanted.max_new_tokens} tokens"
            missing.append(Measurement(subject, "generations", what, file, prompts))
        return missing

    def _settled(self, subject: Any, text: Any) -> Any:
        """A text of the suite, and whether this model reads it after a BOS."""
        if text.bos is not None:
            return text
        if subject.fingerprint not in self._adding:
            self._adding[subject.fingerprint] = adds_bos(subject.tokenizer())
        return text.model_copy(update={"bos": self._adding[subject.fingerprint]})

    def _key(self, part: Any) -> list[Any]:
        """What a result of a text depends on, its content included."""
        content = self._digest(part.file) if part.file else part.hub
        return [part.model_dump(mode="json", exclude={"file"}), content, self.wanted.dtype]

    @cached_property
    def _data(self) -> dict[str, str | None]:
        return data_digests(self.wanted.suite.tasks)

    def _digest(self, path: Path) -> str:
        if path not in self._digests:
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            parts = [file_digest(file) for file in files if file.is_file()]
            self._digests[path] = _short(parts)
        return self._digests[path]

    def _file(self, subject: OpenedModel, stem: str, key: Any) -> Path:
        folder = f"{subject.name}-{subject.fingerprint[:8]}"
        return self.place / folder / f"{stem}-{_short(key)}.json"

    def _has_evaluation(self, subject: OpenedModel, text: PerplexityText) -> bool:
        """Whether it was measured by somebody: with so many windows, or, where all are asked for,
        with as many as every other model here."""
        alike: dict[int, set[str]] = {}
        for one in self.elsewhere.evaluations:
            same = (one.text, one.window, one.bos) == (_called(text.label), text.window, text.bos)
            if same and text.max_windows in (None, one.windows):
                alike.setdefault(one.tokens, set()).add(one.model.fingerprint)
        if text.max_windows is None:
            everyone = {one.fingerprint for one in self.subjects}
            return any(everyone <= models for models in alike.values())
        return any(subject.fingerprint in models for models in alike.values())

    def _has_tasks(self, subject: OpenedModel) -> bool:
        """Whether somebody asked: with transformers, or with an engine that all were asked with."""
        wanted = self.wanted
        alike: dict[str, set[str]] = {}
        for one in self.elsewhere.tasks:
            if same_tasks(one, wanted, self._data):
                for engine in {task.engine for task in one.tasks}:
                    alike.setdefault(engine, set()).add(one.model.fingerprint)
        everyone = {one.fingerprint for one in self.subjects}
        with_ours = subject.fingerprint in alike.get("transformers", ())
        return with_ours or any(everyone <= models for models in alike.values())

    def _asking(self, asked: AbilityItems) -> Asking:
        from shearling.evaluate.abilities.measure import Asking

        return Asking(self.wanted.seed, self.wanted.limit or asked.limit, asked.bos)

    def _has_abilities(self, subject: OpenedModel, asking: Asking) -> bool:
        return any(
            one.model.fingerprint == subject.fingerprint
            and (one.asked_sha256, one.limit, one.bos, one.dtype)
            == (asking.digest(), asking.limit, asking.bos, self.wanted.dtype)
            for one in self.elsewhere.abilities
        )

    def _has_degeneration(self, subject: OpenedModel, each: DegenerationText) -> bool:
        sizes = (each.prompts, each.prompt_tokens, each.new_tokens)
        return any(
            one.model.fingerprint == subject.fingerprint
            and one.text == _called(each.label)
            and (one.prompts, one.prompt_tokens, one.new_tokens) == sizes
            and _temperature(one.sampling) == each.temperature
            and one.bos == each.bos
            for one in self.elsewhere.degenerations
        )

    def _said(self, subject: OpenedModel) -> set[str]:
        """Prompts that the model has continued, greedily and as far as wanted."""
        return {
            sample.prompt
            for one in self.known.generations
            if one.model.fingerprint == subject.fingerprint
            and (one.max_new_tokens, one.dtype) == (self.wanted.max_new_tokens, self.wanted.dtype)
            and _temperature(one.sampling) == 0
            for sample in one.samples
        }

    def _bench(self) -> Measurement | None:
        """Timings count only if all models took turns: one that is missing, and all are timed."""
        load = self.wanted.bench
        if load is None:
            return None
        everyone = {one.fingerprint for one in self.subjects}
        if all_timed(measurements(self.known).runs, everyone, load, self.wanted):
            return None
        key = [sorted(everyone), load.__dict__, self.wanted.dtype, self.wanted.device]
        sizes = ", ".join(map(str, load.batches))
        what = (
            f"speed of {len(self.subjects)} models in turns: batch {sizes}, prompt of "
            f"{load.prompt}, {load.new} new tokens, {load.repeats} rounds"
        )
        return Measurement(None, "bench", what, self.place / f"bench-{_short(key)}.json")


def measure(
    jobs: Sequence[Measurement],
    subjects: Sequence[OpenedModel],
    paths: Sequence[str],
    wanted: WantedResults,
    progress: Progress = silent,
) -> None:
    """Measure what is missing, a model at a time; each result is written as soon as it is there.

    Args:
        subjects: all models of the comparison, and ``paths``, how the user named each.

    Raises:
        ShearlingError: a model, text or task that cannot be measured, or a model that does not fit
            in memory.
    """
    from shearling.model.loading import load_model

    for subject in subjects:
        mine = [job for job in jobs if job.subject is subject]
        if not mine:
            continue
        loaded: list[Any] = []

        def load(subject: OpenedModel = subject, loaded: list[Any] = loaded) -> tuple[Any, Any]:
            if not loaded:
                model = load_model(subject.path, dtype=wanted.dtype, device=wanted.device)
                loaded.extend((model, subject.tokenizer()))
            return loaded[0], loaded[1]

        for job in mine:
            write_json(job.file, _run(job, load, wanted, progress))
    for job in jobs:
        if job.kind == "bench" and wanted.bench is not None:
            write_json(job.file, _time(paths, wanted, wanted.bench, progress))


def _run(job: Measurement, load: Any, wanted: WantedResults, progress: Progress) -> dict[str, Any]:
    """The result file of one job on one model."""
    from shearling.evaluate.generation import Sampling
    from shearling.evaluate.measure import evaluate_text, generate_samples, measure_degeneration
    from shearling.evaluate.perplexity import Windows

    subject, item = job.subject, job.item
    assert subject is not None, "a benchmark is of all models, and runs apart"
    if job.kind == "evaluation":
        windows = Windows(item.window, item.max_windows, item.bos)
        text = _documents(item)
        return evaluate_text(subject, *load(), text, item.label, windows=windows, progress=progress)
    if job.kind == "degeneration":
        options = item.model_dump(exclude={"file", "hub"}) | {"seed": wanted.seed}
        return measure_degeneration(
            subject, *load(), _documents(item), item.label, progress=progress, **options
        )
    if job.kind == "abilities":
        from shearling.evaluate.abilities.measure import measure_abilities

        return measure_abilities(subject, *load(), item, dtype=wanted.dtype, progress=progress)
    if job.kind == "generations":
        return generate_samples(
            subject, item, Sampling(wanted.max_new_tokens, seed=wanted.seed), model=load()[0],
            progress=progress,
        )  # fmt: skip
    from shearling.evaluate.tasks.run import TaskRunner

    tasks = TaskRunner(
        wanted.name, wanted.suite.tasks, limit=wanted.limit, seed=wanted.seed, dtype=wanted.dtype
    )
    return tasks.run(subject, load, recalled=tasks.recalled(subject), progress=progress)


def _documents(part: Any) -> list[str]:
    if part.hub:
        from shearling.evaluate.tasks.hub import hub_text

        return hub_text(part.hub)
    from shearling.data.documents import documents

    return documents(part.file)


def _time(
    paths: Sequence[str], wanted: WantedResults, load: Load, progress: Progress
) -> dict[str, Any]:
    from shearling.evaluate.benchmark import bench_models
    from shearling.evaluate.speed import Workload

    workload = Workload(
        batches=load.batches, prompts=(load.prompt,), news=(load.new,), repeats=load.repeats,
        dtype=wanted.dtype, device=wanted.device, threads=load.threads,
    )  # fmt: skip
    return bench_models(paths, workload, progress=progress)


def _called(label: str) -> str:
    """What results call a text, as ``report`` reads it."""
    return PurePath(label).stem if label.endswith(ENDINGS) else label


def _temperature(sampling: Any) -> float:
    """0 for a greedy choice, however it is written."""
    value = sampling.get("temperature") if isinstance(sampling, dict) else None
    return float(value) if isinstance(value, int | float) else 0.0


def _short(value: Any) -> str:
    """A digest for a file's name."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
