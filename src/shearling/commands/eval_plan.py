"""What ``shearling eval`` measures of every model, and the measuring of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shearling.commands.options import warn

if TYPE_CHECKING:
    from shearling.commands.eval import EvalOptions
    from shearling.evaluate.tasks.run import TaskRunner
    from shearling.evaluate.tasks.suite import AbilityItems, Suite
    from shearling.files.progress import Progress
    from shearling.model.subject import OpenedModel

NEW_TOKENS = 64  # that --prompt is continued by


@dataclass
class EvalPlan:
    """What is measured of every model, and how far it is known already."""

    name: str
    suite: Suite
    subjects: Sequence[OpenedModel]
    options: EvalOptions
    texts: dict[Any, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what cannot be measured, and recall what is known."""
        from shearling.evaluate.measure import memory_needed
        from shearling.evaluate.tasks.engine import task_engine
        from shearling.evaluate.tasks.run import TaskRunner

        options = self.options
        self.bytes = [
            memory_needed(subject, dtype=options.dtype, device=options.device)
            for subject in self.subjects
        ]
        engine = None
        if self.suite.tasks:
            engine = task_engine(options.engine, options.vllm, options.device)
        self.tasks: TaskRunner = TaskRunner(
            self.name, self.suite.tasks, limit=options.limit, seed=options.seed,
            dtype=options.dtype, batch=options.batch,
            engine=engine,
        )  # fmt: skip
        self.recalled = [
            {} if options.fresh else self.tasks.recalled(subject) for subject in self.subjects
        ]

    def describe(self) -> dict[str, Any]:
        """What a run would do."""
        return {
            "suite": self.name,
            **self.suite.model_dump(mode="json"),
            "limit": self.options.limit,
            "engine": self.tasks.engine.label,
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
        known = set.intersection(*(set(labels) for labels in self.recalled))
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
                from shearling.data.documents import documents

                self.texts[key] = documents(source.file)
        return self.texts[key]

    def measure(
        self, subject: OpenedModel, write: Callable[[str, dict[str, Any]], None], progress: Progress
    ) -> list[dict[str, Any]]:
        """Every file of results of one model, each written as soon as it is there."""
        load = LoadedOnce(subject, self.options.dtype, self.options.device)
        files = []
        for stem, result in self._results(subject, load, progress):
            write(stem, result)
            files.append(result)
        return files

    def _results(
        self, subject: OpenedModel, load: LoadedOnce, progress: Progress
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Results of one model, each with its file's name."""
        from shearling.evaluate.measure import evaluate_text, measure_degeneration
        from shearling.evaluate.perplexity import Windows

        seed = self.options.seed
        # A server wants the GPU before a model of ours has taken it.
        if self.suite.tasks and self.tasks.engine.served:
            yield f"tasks-{self.name}", self._run_tasks(subject, load, progress)
        for text in self.suite.texts:
            windows = Windows(text.window, text.max_windows, text.bos)
            yield (
                f"evaluation-{text.stem}",
                evaluate_text(
                    subject,
                    *load(),
                    self.documents(text),
                    text.label,
                    windows=windows,
                    progress=progress,
                ),
            )
        if self.suite.tasks and not self.tasks.engine.served:
            yield f"tasks-{self.name}", self._run_tasks(subject, load, progress)
        for asked in self.suite.abilities:
            yield "abilities", self._asked(asked, subject, load, progress)
        for text in self.suite.degeneration:
            settings = text.model_dump(exclude={"file", "hub"}) | {"seed": seed}
            how = f"-t{text.temperature:g}" if text.temperature else ""
            yield (
                f"degeneration-{text.stem}{how}",
                measure_degeneration(
                    subject,
                    *load(),
                    self.documents(text),
                    text.label,
                    progress=progress,
                    **settings,
                ),
            )
        if self.options.prompt:
            yield "generations", self._continued(subject, load()[0], progress)

    def _asked(
        self, asked: AbilityItems, subject: OpenedModel, load: LoadedOnce, progress: Progress
    ) -> dict[str, Any]:
        """The abilities of one model."""
        from shearling.evaluate.abilities.measure import Asking, measure_abilities

        options = self.options
        limit = options.limit or asked.limit
        asking = Asking(options.seed, limit, asked.bos, options.batch)
        return measure_abilities(subject, *load(), asking, dtype=options.dtype, progress=progress)

    def _continued(self, subject: OpenedModel, model: Any, progress: Progress) -> dict[str, Any]:
        """What a loaded model writes after each prompt."""
        from shearling.evaluate.generation import Sampling
        from shearling.evaluate.measure import generate_samples

        options = self.options
        new = options.max_new_tokens or NEW_TOKENS
        sampling = Sampling(new, options.temperature, options.top_p, options.seed)
        prompts = options.prompt or []
        return generate_samples(subject, prompts, sampling, model=model, progress=progress)

    def _run_tasks(self, subject: OpenedModel, load: Any, progress: Progress) -> dict[str, Any]:
        from shearling.engine.devices import give_back_memory

        known = {} if self.options.fresh else self.tasks.recalled(subject)
        if known:
            print(
                f"shearling: {len(known)} of {len(self.suite.tasks)} tasks of {subject.name} come "
                "from the cache; --fresh runs them again.",
                file=sys.stderr,
            )
        if self.tasks.engine.served:
            give_back_memory()  # what the model before has left
        result = self.tasks.run(subject, load, recalled=known, progress=progress)
        for name, task in result["tasks"].items():
            if task.get("truncated"):
                warn(
                    f"{task['truncated']} requests of {name} are longer than the positions of "
                    f"{subject.name} and lost their beginning."
                )
        return result


class LoadedOnce:
    """A model and its tokenizer, loaded when they are first asked for."""

    def __init__(self, subject: OpenedModel, dtype: str, device: str) -> None:
        """Load nothing yet."""
        self._subject, self._how = subject, {"dtype": dtype, "device": device}
        self._loaded: tuple[Any, Any] | None = None

    def __call__(self) -> tuple[Any, Any]:
        """Both, in evaluation mode and on the device."""
        if self._loaded is None:
            from shearling.model.loading import load_model

            tokenizer = self._subject.tokenizer()
            self._loaded = load_model(self._subject.path, **self._how), tokenizer
        return self._loaded
