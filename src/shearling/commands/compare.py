"""``shearling compare``: what the command line says, checked, measured and made into one page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shearling.commands.options import (
    Batches,
    Bos,
    Computer,
    Json,
    MeasuredIn,
    ModelsOptions,
    Seed,
    check_file,
    numbers,
    print_result,
    tell_measured,
    warn,
)
from shearling.commands.takes import takes_options
from shearling.errors import ShearlingError

if TYPE_CHECKING:
    from shearling.evaluate.tasks.suite import Suite
    from shearling.model.subject import OpenedModel
    from shearling.report.decide.choice import Decision
    from shearling.report.decide.selection import ComparedModel
    from shearling.report.measured import Measurement, WantedResults


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What the command line says."""

    models: ModelsOptions
    output: Annotated[Path, typer.Option(help="The HTML file.")] = Path("comparison.html")
    baseline: Annotated[
        str | None,
        typer.Option(help="Which of the models the others are compared with; default the first."),
    ] = None
    results: Annotated[
        list[Path] | None,
        typer.Option(help="A directory with results about these models; may be repeated."),
    ] = None
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Measure perplexity on this text: .jsonl, .txt, or a directory of such."),
    ] = None
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window of --text.")] = 512
    max_windows: Annotated[
        int | None, typer.Option(min=1, help="Use the first so many windows; default all.")
    ] = None
    bos: Bos = None
    suite: Annotated[
        str | None,
        typer.Option(
            help="Also measure abilities, retention, shortened, sheared, or a YAML file of yours."
        ),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Ask the first so many questions of each task and ability."),
    ] = None
    prompt: Annotated[
        list[str] | None, typer.Option(help="Let every model continue this; may be repeated.")
    ] = None
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts to continue: .jsonl with a 'prompt' field, or a line each."),
    ] = None
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens after each prompt.")] = 64
    bench: Annotated[
        bool, typer.Option("--bench/--no-bench", help="Time all models in turns, shortly.")
    ] = False
    batch: Batches = "1"
    within: Annotated[
        float,
        typer.Option(
            min=0, max=100, help="Per cent of the baseline's quality that the pick may lose."
        ),
    ] = 5.0
    seed: Seed = 0
    dtype: MeasuredIn = "auto"
    device: Computer = "auto"
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of --bench.")] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be measured, and run nothing.")
    ] = False
    as_json: Json = False


@takes_options
def compare(options: CompareOptions) -> None:
    """Make one page that says which of several models to ship.

    Results about the models are found in their directories, in MODEL.results beside them and in
    --results; what is asked for and not there is measured, into OUTPUT's name with .results, so
    that a second run goes on where the first was stopped.
    """
    from shearling.engine.devices import measured_on
    from shearling.evaluate.tasks.run import require_lm_eval
    from shearling.report.measured import Missing, gather
    from shearling.report.pages.comparison_report import write_comparison

    check_file(options.output)
    _check_results(options.results or [])
    wanted = _wanted(options)
    subjects, candidates, paths = _open(options.models, options.baseline)
    device, dtype = measured_on(options.device, options.dtype, [one.parameters for one in subjects])
    wanted = replace(wanted, device=device, dtype=dtype)
    place = options.output.with_name(f"{options.output.stem}.results")
    elsewhere = options.results or []
    records = gather(subjects, [*elsewhere, place])
    jobs = Missing(subjects, wanted, place, gather(subjects, elsewhere), records).jobs()
    if options.dry_run:
        _print_plan(jobs, options)
        return
    if jobs:
        if any(job.kind == "tasks" for job in jobs):
            require_lm_eval(wanted.suite.tasks)
        tell_measured(options.device, device, dtype)
        from shearling.files.unfinished import alone

        with alone(place, place):
            _measure(jobs, subjects, paths, wanted)
        records = gather(subjects, [*elsewhere, place])
    choice = write_comparison(records, candidates, options.output, within=options.within / 100)
    described = choice_as_json(choice) | {"output": str(options.output), "measured": len(jobs)}
    print_result(described, options.as_json, [*_lines(choice), f"wrote {options.output}"])


def _check_results(directories: Sequence[Path]) -> None:
    for directory in directories:
        if not directory.is_dir():
            raise ShearlingError(
                f"--results {directory} is not a directory; give one with result files, as "
                "`shearling eval` and `bench` write them."
            )


def _wanted(options: CompareOptions) -> WantedResults:
    """What is asked for of every model."""
    from shearling.report.measured import Load, WantedResults

    bench = None
    if options.bench:
        bench = Load(tuple(numbers(options.batch, "--batch", 1)), threads=options.threads)
    prompts = [*(options.prompt or []), *_prompts(options.prompts)]
    return WantedResults(
        *_suite(options),
        limit=options.limit,
        prompts=tuple(dict.fromkeys(prompts)),
        max_new_tokens=options.max_new_tokens,
        bench=bench,
        seed=options.seed,
    )


def choice_as_json(choice: Decision) -> dict[str, Any]:
    """What was decided, and by which figures."""
    field = choice.field

    def name(model: Any) -> str | None:
        return None if model is None else model.name

    return {
        "baseline": field.baseline.name,
        "within": choice.within,
        "pick": name(choice.pick),
        "fastest": name(choice.fastest),
        "deciding": [measure.name for measure in choice.deciding],
        "dominated": {
            model.name: choice.dominated[model.fingerprint].name
            for model in field.models
            if model.fingerprint in choice.dominated
        },
        "models": [
            {
                "name": model.name,
                "fingerprint": model.fingerprint,
                "parameters": model.parameters,
                "bytes": model.bytes,
                "loss": choice.loss(model),
                "abilities": {
                    share.ability: share.left
                    for share in field.abilities.get(model.fingerprint, ())
                },
                "figures": {
                    measure.name: value.value
                    for measure in field.measures
                    if (value := measure.of(model)) is not None
                },
            }
            for model in field.models
        ],
    }


def _open(
    models: ModelsOptions, baseline: str | None
) -> tuple[list[Any], list[ComparedModel], list[str]]:
    """The models, the baseline first, each once; as the page knows them, and as they were named."""
    from shearling.model.subject import open_subject
    from shearling.report.measured import candidate

    opened = [
        (open_subject(path), model)
        for path, model in zip(models.given(), models.models, strict=True)
    ]
    if baseline is not None:
        first = _baseline(opened, baseline)
        opened.sort(key=lambda pair: pair is not first)
    distinct: dict[str, tuple[Any, str]] = {}
    for subject, given in opened:
        _, held = distinct.setdefault(subject.fingerprint, (subject, given))
        if held != given:
            warn(f"{given} is the same model as {held}, and is left out.")
    subjects, paths = (
        [pair[0] for pair in distinct.values()],
        [pair[1] for pair in distinct.values()],
    )
    return subjects, [candidate(*pair) for pair in distinct.values()], paths


def _baseline(opened: Sequence[tuple[Any, str]], baseline: str) -> tuple[Any, str]:
    """The one that was meant: by its name, as it was given, or by where it lies."""
    meant = [pair for pair in opened if baseline in (pair[1], pair[0].name)]
    if not meant and Path(baseline).exists():
        place = Path(baseline).resolve()
        meant = [pair for pair in opened if Path(pair[1]).resolve() == place]
    if not meant:
        raise ShearlingError(
            f"--baseline {baseline} is none of the models given; give one of "
            f"{', '.join(given for _, given in opened)}."
        )
    return meant[0]


def _suite(options: CompareOptions) -> tuple[str, Suite]:
    """The suite named with the texts of the command line, and what results call it."""
    from shearling.evaluate.tasks.suite import CUSTOM, build_suite, load_suite, merged

    name, texts = options.suite, options.text or []
    for text in texts:
        if not text.exists():
            raise ShearlingError(
                f"--text {text} is not there; give a .jsonl or .txt file, or a directory of such."
            )
    windows = {
        "window": options.window,
        "max_windows": options.max_windows,
        "bos": options.bos,
    }
    own = build_suite(texts=[{"file": text} | windows for text in texts])
    if name is None:
        return CUSTOM, own
    label, suite = load_suite(name)
    return label, merged(suite, own)


def _prompts(file: Path | None) -> list[str]:
    """One prompt a line: a JSON object with ``prompt``, or the text itself."""
    if file is None:
        return []
    try:
        lines = [line for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ShearlingError(
            f"--prompts {file} cannot be read ({error}); give a UTF-8 file with a prompt a line."
        ) from error
    if not lines:
        raise ShearlingError(f"--prompts {file} is empty; give a prompt a line.")
    if file.suffix != ".jsonl":
        return lines
    return [_prompt(file, number, line) for number, line in enumerate(lines, 1)]


def _prompt(file: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    value = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(value, str):
        raise ShearlingError(
            f"--prompts {file}: entry {number} has no text in a field 'prompt'; give lines such as "
            '{"prompt": "The sheep"}.'
        )
    return value


def _measure(
    jobs: Sequence[Measurement],
    subjects: Sequence[OpenedModel],
    paths: Sequence[str],
    wanted: WantedResults,
) -> None:
    from shearling.files.terminal import progress_bars
    from shearling.report.measured import measure

    with progress_bars() as progress:
        measure(jobs, subjects, paths, wanted, progress)


def _print_plan(jobs: Sequence[Measurement], options: CompareOptions) -> None:
    plan = {"output": str(options.output), "jobs": [job.as_json() for job in jobs]}
    lines = [
        f"{job.subject.name}: {job.what}" if job.subject is not None else job.what for job in jobs
    ]
    lines = [*(lines or ["nothing has to be measured"]), f"then {options.output} would be written"]
    print_result(plan, options.as_json, lines)


def _lines(choice: Decision) -> list[str]:
    """What was decided, for a terminal."""
    field = choice.field
    lines = []
    if choice.pick is not None:
        loss = choice.loss(choice.pick) or 0.0
        change = "" if choice.pick is field.baseline else (
            f", {abs(loss):.1%} {'worse' if loss > 0 else 'better'} than {field.baseline.name}"
        )  # fmt: skip
        lines.append(f"pick: {choice.pick.name}{change}")
    else:
        lines.append(f"no pick: no quality that compares was measured of {field.baseline.name}")
    if choice.fastest is not None:
        lines.append(f"fastest: {choice.fastest.name}")
    for model in field.models:
        if model.fingerprint in choice.dominated:
            winner = choice.dominated[model.fingerprint].name
            lines.append(f"beaten throughout: {model.name}, by {winner}")
    return lines
