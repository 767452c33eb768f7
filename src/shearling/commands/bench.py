"""``shearling bench``: what the command line says, checked, and handed to the benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shearling.commands.options import Batches, Json, Models, check_file, numbers, print_result
from shearling.errors import ShearlingError

ENGINES = ("transformers", "llama.cpp", "vllm")


def bench(
    models: Models,
    batch: Batches = "1,8",
    prompt: Annotated[str, typer.Option(help="Prompt tokens, separated by commas.")] = "128",
    new: Annotated[str, typer.Option(help="Generated tokens, separated by commas.")] = "64",
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds; the median counts.")] = 5,
    engine: Annotated[
        str, typer.Option(help=f"Of {', '.join(ENGINES)}; several separated by commas.")
    ] = "transformers",
    llama_cpp: Annotated[
        Path | None,
        typer.Option(help="A directory with llama.cpp's programs; default $LLAMA_CPP, then PATH."),
    ] = None,
    vllm: Annotated[
        Path | None, typer.Option(help="The vllm program of its environment; default on the PATH.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="What to compute in.")] = "float32",
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where to write the result.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be timed, and run nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Time prefill and decode and measure memory, in turns when several models are given.

    Over a grid of batch sizes and lengths, and on other engines too. Models after the first are
    set against it: speed-up, parameters removed, and what the operations removed promise. A .gguf
    file runs as it is with llama.cpp; a directory is converted once, into the cache.
    """
    check_file(output)
    engines = list(dict.fromkeys(name.strip() for name in engine.split(",")))
    unknown = [name for name in engines if name not in ENGINES]
    if unknown:
        raise ShearlingError(
            f"--engine {engine!r} names {unknown[0]!r}, but {', '.join(ENGINES)} were expected, "
            "separated by commas."
        )
    options = {
        "engines": engines,
        "batches": numbers(batch, "--batch"),
        "prompts": numbers(prompt, "--prompt"),
        "news": numbers(new, "--new"),
        "repeats": repeats,
        "dtype": dtype,
        "device": device,
        "threads": threads,
    }
    from shearling.evaluate.benchmark import bench_lines, bench_models, plan_lines
    from shearling.evaluate.engines import Places
    from shearling.evaluate.speed import plan_bench
    from shearling.files.terminal import progress_bars
    from shearling.files.writer import write_json

    places = Places(llama_cpp, vllm)
    if dry_run:
        planned = plan_bench(models, places=places, **options).as_json()
        print_result(planned, as_json, plan_lines(planned))
        return
    with progress_bars() as progress:
        result = bench_models(models, places=places, **options, progress=progress)
    if output is not None:
        write_json(output, result)
    print_result(result, as_json, bench_lines(result))
