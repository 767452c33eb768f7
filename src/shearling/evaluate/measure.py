"""Measurements of opened checkpoints, as the result files of docs/files.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shearling.evaluate.generation import generate
from shearling.evaluate.perplexity import LOGITS_BYTES, evaluate, perplexity
from shearling.evaluate.results import Degeneration, Evaluation, Generations, Repetition, Sample
from shearling.files.progress import Progress, silent
from shearling.model.checkpoint import Checkpoint
from shearling.model.dtypes import dtype_of
from shearling.model.loading import load_model
from shearling.model.manifest import ref
from shearling.model.memory import check_fits, loaded_bytes


def evaluate_model(
    checkpoint: Checkpoint, text: Path, *, progress: Progress = silent, **options: Any
) -> dict[str, Any]:
    """Perplexity on ``text``; options as in ``shearling.evaluate.perplexity.evaluate``."""
    figures = evaluate(checkpoint.path, text, progress=progress, **options)
    figures |= {"text": text.name}
    del figures["kind"]
    return Evaluation(model=ref(checkpoint), **figures).to_json()


def evaluate_text(
    subject: Any, model: Any, tokenizer: Any, documents: Sequence[str], name: str, **options: Any
) -> dict[str, Any]:
    """The same of a model in memory, on documents called ``name``."""
    figures = perplexity(model, tokenizer, documents, **options)
    return Evaluation(model=ref(subject), text=name, **figures).to_json()


def measure_degeneration(
    subject: Any, model: Any, tokenizer: Any, documents: Sequence[str], name: str, **options: Any
) -> dict[str, Any]:
    """Repetition in what a model in memory writes; options as in ``evaluate.degeneration``."""
    from shearling.evaluate.degeneration import degeneration

    figures = degeneration(model, tokenizer, documents, **options)
    figures |= {"reference": Repetition(**figures["reference"])}
    return Degeneration(model=ref(subject), text=name, **figures).to_json()


def generate_samples(
    checkpoint: Any,
    prompts: Sequence[str],
    *,
    model: Any = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: str = "float32",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Continuations of ``prompts``; empty where there are none. ``model``: if it is loaded."""
    if not prompts:
        return {}
    if model is None:
        model = load_model(checkpoint.path, dtype=dtype)
    samples = generate(
        model, checkpoint.tokenizer(), prompts,
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
        progress=progress,
    )  # fmt: skip
    sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
    return Generations(
        model=ref(checkpoint),
        sampling=sampling if temperature else {"method": "greedy"},
        max_new_tokens=max_new_tokens,
        samples=tuple(Sample(**sample) for sample in samples),
    ).to_json()


def memory_needed(subject: Any, *, dtype: str, device: str = "cpu") -> int:
    """Bytes that a model's weights, computing in ``dtype``, and its logits take.

    Raises:
        ShearlingError: an unknown dtype, or more bytes than are free.
    """
    kind, path = dtype_of(dtype), Path(subject.path)
    logits = 2 * LOGITS_BYTES  # the logits and their exponentials
    check_fits(path, kind, extra_bytes=logits, device=device)
    return loaded_bytes(path, kind) + logits
