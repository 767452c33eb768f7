"""Measurements of opened checkpoints, as the result files of docs/files.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shearling.evaluate.generation import Sampling, generate
from shearling.evaluate.perplexity import LOGITS_BYTES, Windows, evaluate, perplexity
from shearling.evaluate.results import Degeneration, Evaluation, Generations, Repetition, Sample
from shearling.files.progress import Progress, silent
from shearling.model.checkpoint import Checkpoint
from shearling.model.dtypes import dtype_of, name_of
from shearling.model.loading import load_model
from shearling.model.manifest import ref
from shearling.model.memory import check_fits, loaded_bytes
from shearling.model.subject import OpenedModel


def evaluate_model(
    checkpoint: Checkpoint,
    text: Path,
    windows: Windows | None = None,
    *,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Perplexity on ``text``, as :func:`shearling.evaluate.perplexity.evaluate`."""
    figures = evaluate(checkpoint.path, text, windows, progress=progress)
    figures |= {"text": text.name}
    del figures["kind"]
    return Evaluation(model=ref(checkpoint), **figures).to_json()


def evaluate_text(
    subject: OpenedModel,
    model: Any,
    tokenizer: Any,
    documents: Sequence[str],
    name: str,
    **options: Any,
) -> dict[str, Any]:
    """The same of a model in memory, on documents called ``name``."""
    figures = perplexity(model, tokenizer, documents, **options)
    return Evaluation(model=ref(subject), text=name, **figures).to_json()


def measure_degeneration(
    subject: OpenedModel,
    model: Any,
    tokenizer: Any,
    documents: Sequence[str],
    name: str,
    **options: Any,
) -> dict[str, Any]:
    """Repetition in what a model in memory writes.

    Args:
        options: ``prompts``, ``prompt_tokens``, ``bos`` and ``batch`` of its prompts;
            ``new_tokens``, ``temperature``, ``top_p`` and ``seed`` of what it writes; and
            ``progress``.
    """
    from shearling.evaluate.degeneration import NEW_TOKENS, Beginnings, degeneration

    counts = {"prompts": "count", "prompt_tokens": "tokens", "batch": "batch", "bos": "bos"}
    beginnings = {name: options.pop(key) for key, name in counts.items() if key in options}
    drawn = {key: options.pop(key) for key in ("temperature", "top_p", "seed") if key in options}
    figures = degeneration(
        model, tokenizer, documents, Beginnings(**beginnings),
        Sampling(options.pop("new_tokens", NEW_TOKENS), **drawn), **options,
    )  # fmt: skip
    figures |= {"reference": Repetition(**figures["reference"])}
    return Degeneration(model=ref(subject), text=name, **figures).to_json()


def generate_samples(
    checkpoint: OpenedModel,
    prompts: Sequence[str],
    sampling: Sampling | None = None,
    *,
    model: Any = None,
    dtype: str = "float32",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Continuations of ``prompts``; empty where there are none. ``model``: if it is loaded."""
    if not prompts:
        return {}
    if model is None:
        model = load_model(checkpoint.path, dtype=dtype)
    sampling = sampling or Sampling()
    samples = generate(model, checkpoint.tokenizer(), prompts, sampling, progress=progress)
    return Generations(
        model=ref(checkpoint),
        sampling=sampling.as_json(),
        max_new_tokens=sampling.max_new_tokens,
        dtype=name_of(model.dtype),
        samples=tuple(Sample(**sample) for sample in samples),
    ).to_json()


def memory_needed(subject: OpenedModel, *, dtype: str, device: str = "cpu") -> int:
    """Bytes that a model's weights, computing in ``dtype``, and its logits take.

    Raises:
        ShearlingError: an unknown dtype, or more bytes than are free.
    """
    kind, path = dtype_of(dtype), Path(subject.path)
    logits = 2 * LOGITS_BYTES  # the logits and their exponentials
    check_fits(path, kind, extra_bytes=logits, device=device)
    return loaded_bytes(path, kind) + logits
