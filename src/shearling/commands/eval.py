"""``shearling eval``: texts, tasks and repetition of one or several models, measured alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shearling.commands.options import (
    Bos,
    Computer,
    Json,
    MeasuredIn,
    ModelsOptions,
    Seed,
    VllmProgram,
    print_result,
    tell_measured,
    warn_ignored,
)
from shearling.commands.takes import takes_options
from shearling.errors import ShearlingError

if TYPE_CHECKING:
    from shearling.commands.eval_plan import EvalPlan
    from shearling.evaluate.tasks.suite import Suite
    from shearling.model.subject import OpenedModel

WINDOW = 512


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What the command line says."""

    models: ModelsOptions
    suite: Annotated[
        str | None,
        typer.Option(help="abilities, retention, shortened, sheared, or a YAML file of your own."),
    ] = None
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Perplexity on this text: .jsonl, .txt, or a directory of such; may be repeated."
        ),
    ] = None
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-eval, or .jsonl files of questions, separated by commas."),
    ] = None
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question of --tasks.")
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Ask the first so many questions of each task and ability."),
    ] = None
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Requests of tasks and abilities at a time; default by length, with vllm 64.",
        ),
    ] = None
    engine: Annotated[
        str, typer.Option(help="What runs the models of tasks: transformers, or vllm on a server.")
    ] = "transformers"
    vllm: VllmProgram = None
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Run tasks again whose results are in the cache.")
    ] = False
    degeneration: Annotated[
        bool,
        typer.Option("--degeneration", help="Measure how continuations of each --text repeat."),
    ] = False
    window: Annotated[
        int | None, typer.Option(min=2, help="Tokens in a window of --text; default 512.")
    ] = None
    max_windows: Annotated[
        int | None, typer.Option(min=1, help="Use the first so many windows; default all.")
    ] = None
    bos: Bos = None
    prompt: Annotated[
        list[str] | None, typer.Option(help="Continue this prompt; may be repeated.")
    ] = None
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens to generate; default 64, with --degeneration 128."),
    ] = None
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Nucleus sampling.")] = 1.0
    seed: Seed = 0
    dtype: MeasuredIn = "auto"
    device: Computer = "auto"
    output: Annotated[
        Path | None,
        typer.Option(help="A directory for the results; of several models, one for each in it."),
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be measured, and run nothing.")
    ] = False
    as_json: Json = False


@takes_options
def evaluate(options: EvalOptions) -> None:
    """Measure perplexity, tasks, abilities and repetition of models, and show what they write.

    Tasks are run through lm-eval; their results are kept by the model's fingerprint, so that a run
    that was stopped goes on with the task it was at. With --engine vllm a server answers them,
    many at a time; all else is measured with transformers.
    """
    from shearling.evaluate.tasks.lines import all_lines, plan_lines, told_apart
    from shearling.files.staging import check_writable
    from shearling.files.terminal import progress_bars

    output = options.output
    if output is not None and output.exists() and not output.is_dir():
        raise ShearlingError(f"--output {output} is a file; name a directory.")
    if output is not None:
        check_writable(output)
    plan = _plan(options)
    if options.dry_run:
        described = plan.describe()
        print_result(described, options.as_json, plan_lines(described))
        return
    subjects = plan.subjects
    with progress_bars() as progress:
        plan.prepare(progress)
        results = [
            plan.measure(subject, _writer(output, subject, subjects), progress)
            for subject in subjects
        ]
    heads = told_apart([subject.name for subject in subjects], options.models.models)
    lines = all_lines(heads, results)
    print_result(_joined(results), options.as_json, lines)


def _plan(options: EvalOptions) -> EvalPlan:
    """What is asked for, checked; models are opened, and not loaded."""
    from shearling.commands.eval_plan import EvalPlan
    from shearling.engine.devices import measured_on
    from shearling.model.subject import open_subject

    name, suite = _suite(options)
    if suite.empty and not options.prompt:
        raise ShearlingError(
            "There is nothing to measure; give --text FILE, --tasks NAME,…, --suite NAME or "
            "--prompt TEXT."
        )
    _warn_of_ignored(options, suite)
    subjects = [open_subject(model) for model in options.models.given()]
    served_alone = options.engine != "transformers" and not _loads(options, suite)
    device, dtype = measured_on(
        options.device, options.dtype, [one.parameters for one in subjects], ours=not served_alone
    )
    tell_measured(options.device, device, dtype)
    return EvalPlan(name, suite, subjects, replace(options, device=device, dtype=dtype))


def _loads(options: EvalOptions, suite: Suite) -> bool:
    """Whether models are loaded in this process, whatever runs the tasks."""
    return bool(suite.texts or suite.abilities or suite.degeneration or options.prompt)


def _suite(options: EvalOptions) -> tuple[str, Suite]:
    """The suite named, with what options add to it, and the name for both."""
    from shearling.evaluate.tasks.suite import CUSTOM, build_suite, load_suite, merged

    texts = options.text or []
    if options.degeneration and not texts:
        raise ShearlingError("--degeneration continues a text; give it with --text.")
    windows = {
        "window": options.window or WINDOW,
        "max_windows": options.max_windows,
        "bos": options.bos,
    }
    continuation: dict[str, Any] = {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "bos": options.bos,
    }
    if options.max_new_tokens is not None:
        continuation["new_tokens"] = options.max_new_tokens
    named = [part.strip() for part in (options.tasks or "").split(",") if part.strip()]
    given = build_suite(
        texts=[{"file": text} | windows for text in texts],
        tasks=[_task(part, options.shots) for part in named],
        degeneration=[{"file": text} | continuation for text in texts if options.degeneration],
    )
    if options.suite is None:
        return CUSTOM, given
    label, suite = load_suite(options.suite)
    return f"{label}+{CUSTOM}" if named else label, merged(suite, given)


def _task(part: str, shots: int | None) -> dict[str, Any]:
    key = "file" if part.endswith(".jsonl") else "name"
    return {key: part, "shots": shots}


def _warn_of_ignored(options: EvalOptions, suite: Suite) -> None:
    if not options.text:
        windows = {"--window": options.window, "--max-windows": options.max_windows}
        warn_ignored(windows, "they are for --text, and a suite says its own")
    if not (options.prompt or options.degeneration):
        sampled = {
            "--temperature": options.temperature or None,
            "--top-p": None if options.top_p == 1 else options.top_p,
            "--max-new-tokens": options.max_new_tokens,
        }
        warn_ignored(sampled, "they are for --prompt and --degeneration")
    if not options.tasks:
        warn_ignored({"--shots": options.shots}, "it is for --tasks, and a suite says its own")
    if options.engine == "transformers":
        warn_ignored({"--vllm": options.vllm}, "it is for --engine vllm")
    elif not suite.tasks:
        warn_ignored({"--engine": options.engine}, "it is for tasks, and there are none")
    if not (suite.tasks or suite.abilities):
        asked = {"--limit": options.limit, "--batch": options.batch}
        warn_ignored(asked, "they are for tasks and abilities, and there are none")


def _writer(
    output: Path | None, subject: OpenedModel, subjects: Sequence[OpenedModel]
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
    files = [file for of_a_model in results for file in of_a_model]
    if len(results) == 1 and len(files) == 2 and files[1]["kind"] == "generations":
        return files[0] | {"generations": files[1]}
    return files[0] if len(files) == 1 else {"results": files}
