"""Measurements of opened checkpoints, as the result files of docs/files.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shearling.checkpoint import Checkpoint
from shearling.evaluate.generation import generate
from shearling.evaluate.loading import load_model
from shearling.evaluate.perplexity import evaluate
from shearling.evaluate.speed import bench
from shearling.manifest import identity, stamp
from shearling.progress import Progress, silent


def evaluate_model(
    checkpoint: Checkpoint, text: Path, *, progress: Progress = silent, **options: Any
) -> dict[str, Any]:
    """Perplexity on ``text``; options as in ``shearling.evaluate.perplexity.evaluate``."""
    figures = evaluate(checkpoint.path, text, progress=progress, **options)
    return {"kind": "evaluation"} | stamp(checkpoint) | {"text": text.name} | figures


def generate_samples(
    checkpoint: Checkpoint,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: str = "float32",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Continuations of ``prompts``; empty where there are none."""
    if not prompts:
        return {}
    samples = generate(
        load_model(checkpoint.path, dtype=dtype), checkpoint.tokenizer(), prompts,
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
        progress=progress,
    )  # fmt: skip
    sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
    return (
        {"kind": "generations"}
        | stamp(checkpoint)
        | {
            "sampling": sampling if temperature else {"method": "greedy"},
            "max_new_tokens": max_new_tokens,
            "samples": samples,
        }
    )


def bench_models(
    checkpoints: Sequence[Checkpoint], *, progress: Progress = silent, **options: Any
) -> dict[str, Any]:
    """Speed and memory, in turns; options as in ``shearling.evaluate.speed.bench``."""
    result = bench([c.path for c in checkpoints], progress=progress, **options)
    known = {str(c.path): identity(c) for c in checkpoints}
    for run in result["runs"]:
        run["model"] = known[run["model"]["path"]]
    return {"kind": "bench"} | stamp() | result


def bench_lines(result: dict[str, Any]) -> list[str]:
    """A table of a bench for a person: tokens/s are medians, then least and most."""
    head = f"{'model':24} {'batch':>5} {'prefill tok/s':>24} {'decode tok/s':>24} {'peak MiB':>9}"
    rows = [
        f"{run['model']['name'][:24]:24} {run['batch']:5d} "
        f"{_spread(run['prefill_tokens_per_s']):>24} {_spread(run['decode_tokens_per_s']):>24} "
        f"{run['peak_memory_bytes'] / 2**20:9,.0f}"
        for run in result["runs"]
    ]
    return [head, *rows]


def _spread(figures: dict[str, float]) -> str:
    return f"{figures['median']:.1f} ({figures['min']:.1f}-{figures['max']:.1f})"
