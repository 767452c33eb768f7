"""``shearling judge``: what the command line says, checked, and handed to :mod:`judge.run`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shearling.commands.options import (
    Computer,
    Json,
    MeasuredIn,
    MergeAdapter,
    Seed,
    check_file,
    print_result,
    tell_measured,
    warn,
    with_adapter,
)
from shearling.commands.takes import takes_options
from shearling.errors import ShearlingError

if TYPE_CHECKING:
    from shearling.judge.run import Match


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """What the command line says."""

    a: Annotated[str, typer.Argument(help="A model, or a .jsonl of 'prompt' and 'answer'.")]
    b: Annotated[str, typer.Argument(help="The one to compare it with.")]
    merge_adapter: MergeAdapter = False
    prompts: Annotated[
        Path, typer.Option(help="A .jsonl with 'prompt' or 'instruction', or a .txt, one a line.")
    ]
    endpoint: Annotated[
        str | None,
        typer.Option(help="An OpenAI-compatible address; default $OPENAI_BASE_URL, or OpenAI."),
    ] = None
    judge_model: Annotated[
        str | None, typer.Option(help="The judge; default the endpoint's only model.")
    ] = None
    key_env: Annotated[str, typer.Option(help="Environment variable that holds the key.")] = (
        "OPENAI_API_KEY"
    )
    answers: Annotated[
        Path | None,
        typer.Option(help="Where answers and verdicts are kept; default beside --output."),
    ] = None
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 256
    temperature: Annotated[float, typer.Option(min=0, help="Of the answers; 0 is greedy.")] = 0.0
    seed: Seed = 0
    dtype: MeasuredIn = "auto"
    device: Computer = "auto"
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 4
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use the first so many prompts; default all.")
    ] = None
    output: Annotated[Path, typer.Option(help="The result.")] = Path("judgement.json")
    as_json: Json = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, and run nothing.")
    ] = False


@takes_options
def judge(options: JudgeOptions) -> None:
    """Let a judge say which of two models answers better, both ways round; a win rate follows.

    A win counts where both orders agree. A run that ends early goes on when it is run again.
    """
    check_file(options.output)
    _require_client()
    from shearling.files.unfinished import alone
    from shearling.files.writer import write_json
    from shearling.judge.run import expected

    if not options.dry_run:
        with alone(_folder(options), _folder(options)):
            result = _judged(_match(options), options)
            write_json(options.output, result)
        print_result(result, options.as_json, [*_lines(result), f"wrote {options.output}"])
    else:
        match = _match(options)
        needed = expected(match.a, match.b, match.prompts)
        print_result(needed, options.as_json, _needed_lines(needed, match.a.name, match.b.name))


def _require_client() -> None:
    try:
        import shearling.judge.endpoint  # noqa: F401
    except ModuleNotFoundError as error:
        raise ShearlingError(
            f"judging needs {error.name}, which is not installed; pip install 'shearling[judge]'."
        ) from error


def _match(options: JudgeOptions) -> Match:
    """Who answers what, with warnings of what will not tell the two apart."""
    from shearling.engine.devices import measured_on
    from shearling.evaluate.generation import Sampling
    from shearling.judge.prompts import read_prompts
    from shearling.judge.run import Match
    from shearling.judge.sides import open_side

    prompts = read_prompts(options.prompts, options.limit)
    if prompts.repeated:
        warn(
            f"{prompts.repeated} prompts of {options.prompts} stand there twice; each is judged "
            "once"
        )
    sampling = Sampling(options.max_new_tokens, options.temperature, seed=options.seed)
    folder = _folder(options)
    a, b = (
        open_side(str(with_adapter(side, options.merge_adapter)), folder, sampling, options.dtype)
        for side in (options.a, options.b)
    )
    device, dtype = measured_on(options.device, options.dtype, [a.parameters, b.parameters])
    tell_measured(options.device, device, dtype)
    for side in (a, b):
        side.run_on(device, dtype)
    if a.fingerprint == b.fingerprint:
        warn(
            f"{options.a} and {options.b} are the same: every answer is identical and counts as a "
            "tie"
        )
    return Match(a, b, prompts, sampling, folder)


def _folder(options: JudgeOptions) -> Path:
    """Where answers and verdicts are kept."""
    return options.answers or options.output.with_suffix(".answers")


def _judged(match: Match, options: JudgeOptions) -> dict[str, Any]:
    from shearling.files.terminal import progress_bars
    from shearling.judge.endpoint import Judge
    from shearling.judge.run import run

    asked = Judge(options.endpoint, options.judge_model, key_env=options.key_env)
    with progress_bars() as progress:
        return run(match, asked, concurrency=options.concurrency, progress=progress)


def _needed_lines(needed: dict[str, int], a: str, b: str) -> list[str]:
    return [
        f"{needed['prompts']} prompts; to be made: {needed['answers_of_a']} answers of {a}, "
        f"{needed['answers_of_b']} of {b}, at most {needed['verdicts']} verdicts"
    ]


def _lines(result: dict[str, Any]) -> list[str]:
    """A judgement for a person."""
    a, b, rate = result["a"]["name"], result["b"]["name"], result["win_rate"]
    if rate is None:
        lines = [f"{a} against {b}: no verdict of {result['judge']} could be read"]
    else:
        low, high = result["interval"]
        lines = [
            f"{a} against {b}, judged by {result['judge']}: {result['wins']} won, "
            f"{result['ties']} tied, {result['losses']} lost",
            f"win rate {rate:.1%} (95 % interval {low:.1%} to {high:.1%})",
        ]
    if result["identical"]:
        lines.append(f"{result['identical']} ties because both answers are the same text")
    if result["unreadable"]:
        lines.append(
            f"{result['unreadable']} prompts left out: {result['unreadable_verdicts']} verdicts "
            "could not be read"
        )
    if result["first_preferred"] is not None:
        lines.append(f"the answer shown first was preferred {result['first_preferred']:.1%} of ")
        lines[-1] += "the time (50 % is no bias)"
    return lines
