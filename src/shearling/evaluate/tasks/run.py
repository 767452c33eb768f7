"""Tasks of a suite on one model after the other, as files of the kind ``tasks``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from shearling.errors import ShearlingError
from shearling.evaluate.results import TaskResult, TaskResults
from shearling.evaluate.tasks import cache, names, questions
from shearling.evaluate.tasks.engine import TaskEngine
from shearling.evaluate.tasks.suite import Task
from shearling.files.progress import Progress, silent
from shearling.model.manifest import ref, versions
from shearling.model.subject import OpenedModel

EXTRA = "pip install 'shearling[tasks]'"
PRIMARY = ("acc_norm", "acc")  # of a task that names none, the first it has


def require_lm_eval(tasks: Sequence[Task]) -> None:
    """Raise ShearlingError if there are tasks, and lm-eval is not installed."""
    if tasks and find_spec("lm_eval") is None:
        raise ShearlingError(f"Tasks are run with lm-eval, which is not installed; run {EXTRA}.")


class TaskRunner:
    """The tasks of a suite, built when they are first run: a cached result builds none."""

    def __init__(
        self,
        suite: str,
        tasks: Sequence[Task],
        *,
        limit: int | None = None,
        seed: int = 0,
        dtype: str = "float32",
        batch: int | None = None,
        engine: TaskEngine | None = None,
    ) -> None:
        """Read the files of questions; nothing else is built yet.

        Args:
            suite: its name, for results.
            tasks: what to run.
            limit: questions of each task; None asks all.
            seed: moves the draws of shots; 0 draws those of lm-eval's command line.
            dtype: what the model computes in, which may change a figure.
            batch: requests at a time; None goes by their length, with vLLM 64.
            engine: what runs the models; None is transformers.

        Raises:
            ShearlingError: lm-eval is not installed, or a file of questions cannot be used.
        """
        require_lm_eval(tasks)
        self.suite, self.tasks = suite, tasks
        self.limit, self.seed, self.dtype, self.batch = limit, seed, dtype, batch
        self.engine = engine or TaskEngine()
        self._configs = {
            task.label: questions.config(task.label, task.file, task.shots)
            for task in tasks
            if task.file is not None
        }
        self._digests = {t.label: questions.digest(t.file) for t in tasks if t.file is not None}
        self._built: dict[str, list[Any]] = {}

    def key(self, subject: OpenedModel, task: Task) -> dict[str, Any]:
        """What a result of a task depends on."""
        asked = {k: v for k, v in self._configs.get(task.label, {}).items() if not callable(v)}
        return cache.manifest(
            subject,
            task=task.label,
            config=asked,
            data=self._digests.get(task.label),
            shots=task.shots,
            limit=self.limit,
            seed=self.seed,
            dtype=self.dtype,
            versions=_versions(),
            **({"engine": self.engine.label} if self.engine.served else {}),
        )

    def recalled(self, subject: OpenedModel) -> dict[str, dict[str, Any]]:
        """Results that were kept, by the label of the task; a tag's holds several."""
        kept = {task.label: cache.recall(self.key(subject, task)) for task in self.tasks}
        return {label: results for label, results in kept.items() if results is not None}

    def check(self, labels: Sequence[str], progress: Progress = silent) -> None:
        """Build these tasks, which finds unknown names and data that cannot be had.

        Raises:
            ShearlingError: an unknown task, with the nearest that there are; a metric that a task
                does not have; a data set that cannot be fetched.
        """
        wanted = [task for task in self.tasks if task.label in labels]
        names.check_known(t.label for t in wanted if not (t.file or t.label in self._built))
        manager = None
        for i, task in enumerate(wanted):
            if task.label in self._built:
                continue
            progress("preparing tasks", i, len(wanted))
            manager = manager or _manager(any(t.file is None for t in wanted))
            built = self._build(task, manager)
            for each in built:
                _check_metric(each, task)
            self._built[task.label] = built
        if wanted:
            progress("preparing tasks", len(wanted), len(wanted))

    def run(
        self,
        subject: OpenedModel,
        load: Callable[[], tuple[Any, Any]],
        *,
        recalled: Mapping[str, dict[str, Any]],
        progress: Progress = silent,
    ) -> dict[str, Any]:
        """The ``tasks`` file of one model.

        Args:
            load: gives the model and its tokenizer; called only if something has to be run, and
                not where vLLM runs it.
            recalled: results to take as they are, by the task's label.
        """
        missing = [task.label for task in self.tasks if task.label not in recalled]
        self.check(missing, progress)
        scorer: Any = None
        results: dict[str, Any] = {}
        try:
            for number, task in enumerate(self.tasks, start=1):
                by_name = recalled.get(task.label)
                if by_name is None:
                    scorer = scorer or self._scorer(subject, load, progress)
                    stage = f"{task.label} ({number} of {len(self.tasks)})"
                    by_name = self._run(scorer, task, stage)
                    cache.keep(self.key(subject, task), by_name)
                results |= {name: _with_primary(r, task) for name, r in by_name.items()}
        finally:
            if scorer is not None:
                scorer.close()
        return self._file(subject, results)

    def _file(self, subject: OpenedModel, results: dict[str, Any]) -> dict[str, Any]:
        values = [result["metrics"].get(result["primary"]) for result in results.values()]
        known = [value for value in values if value is not None]
        return TaskResults(
            model=ref(subject),
            suite=self.suite,
            tasks={name: TaskResult(**result) for name, result in results.items()},
            average=sum(known) / len(known) if known else None,
            versions=versions() | _versions(),
            seed=self.seed,
            dtype=self.dtype,
            batch=self.batch,
            engine=self.engine.name,
            engine_version=self.engine.version,
        ).to_json()

    def _scorer(
        self, subject: OpenedModel, load: Callable[[], tuple[Any, Any]], progress: Progress
    ) -> Any:
        from shearling.evaluate.tasks.harness import Scorer, quiet

        if self.engine.served:
            from shearling.evaluate.engines.serving import AT_A_TIME, ServingOptions
            from shearling.evaluate.tasks.served import ServedScorer

            assert self.engine.program is not None
            options = ServingOptions(
                self.engine.program, self.engine.device, self.dtype, self.batch or AT_A_TIME,
                self.seed,
            )  # fmt: skip
            with quiet():
                return ServedScorer(subject, options, progress=progress)
        model, tokenizer = load()
        with quiet():
            return Scorer(model, tokenizer, batch=self.batch, progress=progress)

    def _run(self, scorer: Any, task: Task, stage: str) -> dict[str, Any]:
        """Results by the name lm-eval gives them; a tag has one for each of its tasks."""
        from shearling.evaluate.tasks.harness import name_of, run_task

        by_name = {}
        for built in self._built[task.label]:
            scorer.begin(stage)
            started = time.perf_counter()
            raw = run_task(scorer, built, limit=self.limit, seed=self.seed)
            name = name_of(built)
            by_name[name] = _result(raw, name) | {
                "limit": self.limit,
                "seconds": round(time.perf_counter() - started, 3),
                "batch": self.batch,
                "prompt_sha256": scorer.asked,
            }
            if scorer.answers:
                by_name[name]["answer_tokens"] = scorer.answer_tokens / scorer.answers
            if scorer.truncated:
                by_name[name]["truncated"] = scorer.truncated
            if task.label in self._digests:
                by_name[name]["data_sha256"] = self._digests[task.label]
        return by_name

    def _build(self, task: Task, manager: Any) -> list[Any]:
        from lm_eval.api.group import Group

        from shearling.evaluate.tasks.harness import quiet

        if task.file is None and task.label not in manager.all_tasks:
            raise names.unknown(task.label, manager.all_tasks)
        try:
            with quiet():
                loaded = manager.load([self._configs.get(task.label, task.label)])
        except Exception as error:  # whatever the network, the cache or a task's own code raise
            raise _unbuilt(task, error) from error
        tasks = list(loaded["tasks"].values())
        if task.shots is not None:
            for each in tasks:
                each.set_config(key="num_fewshot", value=task.shots)
        group = loaded.get("groups", {}).get(task.label)
        return [group] if isinstance(group, Group) else tasks


def _manager(default: bool) -> Any:
    from lm_eval.tasks import TaskManager

    from shearling.evaluate.tasks.harness import quiet

    with quiet():
        return TaskManager(include_defaults=default)


def _versions() -> dict[str, str]:
    """Of what tasks are run with."""
    return {name: version(name) for name in ("lm_eval", "datasets", "torch", "transformers")}


def _result(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One task of lm-eval's results, its filter's name dropped where there is none."""
    metrics = {
        key.removesuffix(",none"): value if isinstance(value, int | float) else None
        for key, value in raw["results"][name].items()
        if "," in key
    }
    counts = raw["n-samples"]
    parts = [name] if name in counts else list(counts)  # a group asks those of all its tasks
    return {
        "metrics": metrics,
        "shots": raw["n-shot"].get(name),
        "samples": sum(counts[part]["effective"] for part in parts),
        "task_version": raw["versions"].get(name),
    }


def _with_primary(result: dict[str, Any], task: Task) -> dict[str, Any]:
    """The result with the metric that counts named; a filtered one by its full name."""
    names = [name for name in result["metrics"] if "_stderr" not in name]
    asked = (task.metric,) if task.metric else PRIMARY
    first = [n for want in asked for n in names if want in (n, n.split(",")[0])]
    primary = next(iter(first or names), None)
    return {"metrics": result["metrics"], "primary": primary} | result


def _check_metric(built: Any, task: Task) -> None:
    config = getattr(built, "config", None)
    listed = getattr(config, "metric_list", None)
    if task.metric is None or not listed:
        return
    names = [getattr(each["metric"], "__name__", each["metric"]) for each in listed]
    listed_filters = getattr(config, "filter_list", None) or ()
    filters = [f"{name},{each['name']}" for name in names for each in listed_filters]
    if task.metric not in (*names, *filters):
        raise ShearlingError(
            f"The task {task.label} has no metric {task.metric}; it has "
            f"{', '.join(filters or names)}."
        )


def _unbuilt(task: Task, error: Exception) -> ShearlingError:
    reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    if isinstance(error, ConnectionError | OSError):
        return ShearlingError(
            f"The data of the task {task.label} could not be fetched from the hub "
            f"({type(error).__name__}); check the network, or give questions of yours as a file."
        )
    return ShearlingError(
        f"The task {task.label} cannot be set up by lm-eval ({type(error).__name__}: {reason}); "
        "install what it names, or leave the task out."
    )


__all__ = ["TaskRunner"]
