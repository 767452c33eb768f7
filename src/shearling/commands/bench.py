"""``shearling bench``: what the command line says, checked, and handed to the benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shearling.commands.options import (
    Batches,
    Computer,
    Json,
    LlamaCppPrograms,
    MeasuredIn,
    ModelsOptions,
    VllmProgram,
    check_file,
    numbers,
    print_result,
    seconds,
)
from shearling.commands.takes import takes_options
from shearling.errors import ShearlingError

if TYPE_CHECKING:
    from shearling.evaluate.speed import Workload

ENGINES = ("transformers", "llama.cpp", "vllm")


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What the command line says."""

    models: ModelsOptions
    batch: Batches = "1,8"
    prompt: Annotated[str, typer.Option(help="Prompt tokens, separated by commas.")] = "128"
    new: Annotated[str, typer.Option(help="Generated tokens, separated by commas.")] = "64"
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds; the median counts.")] = 5
    budget: Annotated[
        str | None,
        typer.Option(
            help="Time for all of it, such as 90s or 2m; rounds and tokens are left out to keep it."
        ),
    ] = None
    engine: Annotated[
        str, typer.Option(help=f"Of {', '.join(ENGINES)}; several separated by commas.")
    ] = "transformers"
    llama_cpp: LlamaCppPrograms = None
    vllm: VllmProgram = None
    dtype: MeasuredIn = "auto"
    device: Computer = "auto"
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None
    output: Annotated[Path | None, typer.Option(help="Where to write the result.")] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be timed, and run nothing.")
    ] = False
    as_json: Json = False


@takes_options
def bench(options: BenchOptions) -> None:
    """Time prefill and decode and measure memory, in turns when several models are given.

    Over a grid of batch sizes and lengths, and on other engines too. Models after the first are
    set against it: speed-up, parameters removed, and what the operations removed promise. A .gguf
    file runs as it is with llama.cpp; a directory is converted once, into the cache.
    """
    check_file(options.output)
    engines, grid = _engines(options.engine), _grid(options)
    from shearling.evaluate.benchmark import bench_lines, bench_models, plan_lines
    from shearling.evaluate.speed import plan_bench
    from shearling.files.terminal import progress_bars
    from shearling.files.writer import write_json

    workload, models = _workload(options, engines, grid), options.models.given()
    if options.dry_run:
        planned = plan_bench(models, workload).as_json()
        print_result(planned, options.as_json, plan_lines(planned))
        return
    with progress_bars() as progress:
        result = bench_models(models, workload, progress=progress)
    if options.output is not None:
        write_json(options.output, result)
    print_result(result, options.as_json, bench_lines(result))


def _engines(given: str) -> tuple[str, ...]:
    """The engines named, each once (ShearlingError for one that is not known)."""
    engines = tuple(dict.fromkeys(name.strip() for name in given.split(",")))
    unknown = [name for name in engines if name not in ENGINES]
    if unknown:
        raise ShearlingError(
            f"--engine {given!r} names {unknown[0]!r}, but {', '.join(ENGINES)} were expected, "
            "separated by commas."
        )
    return engines


def _grid(options: BenchOptions) -> dict[str, tuple[int, ...]]:
    """Batch sizes and lengths (ShearlingError for one below 1)."""
    return {
        "batches": tuple(numbers(options.batch, "--batch", 1)),
        "prompts": tuple(numbers(options.prompt, "--prompt", 1)),
        "news": tuple(numbers(options.new, "--new", 1)),
    }


def _workload(
    options: BenchOptions, engines: tuple[str, ...], grid: dict[str, tuple[int, ...]]
) -> Workload:
    """What is run on every model."""
    from shearling.evaluate.engines import Places
    from shearling.evaluate.speed import Workload

    return Workload(
        engines=engines,
        places=Places(options.llama_cpp, options.vllm),
        **grid,
        repeats=options.repeats,
        dtype=options.dtype,
        device=options.device,
        threads=options.threads,
        budget=None if options.budget is None else seconds(options.budget, "--budget"),
    )
