"""Measurements of opened checkpoints, as the result files of docs/files.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError
from shearling.evaluate.generation import Sampling, generate
from shearling.evaluate.perplexity import LOGITS_BYTES, Windows, evaluate, perplexity
from shearling.files.progress import Progress, silent
from shearling.model.checkpoint import Checkpoint
from shearling.model.loading import DTYPES, check_fits, load_model, loaded_bytes
from shearling.model.manifest import stamp


def evaluate_model(
    checkpoint: Checkpoint,
    text: Path,
    windows: Windows | None = None,
    *,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Perplexity on ``text``, as :func:`shearling.evaluate.perplexity.evaluate`."""
    figures = evaluate(checkpoint.path, text, windows, progress=progress)
    return {"kind": "evaluation"} | stamp(checkpoint) | {"text": text.name} | figures


def evaluate_text(
    subject: Any, model: Any, tokenizer: Any, documents: Sequence[str], name: str, **options: Any
) -> dict[str, Any]:
    """The same of a model in memory, on documents called ``name``."""
    figures = perplexity(model, tokenizer, documents, **options)
    return {"kind": "evaluation"} | stamp(subject) | {"text": name} | figures


def measure_degeneration(
    subject: Any, model: Any, tokenizer: Any, documents: Sequence[str], name: str, **options: Any
) -> dict[str, Any]:
    """Repetition in what a model in memory writes.

    Args:
        options: ``prompts``, ``prompt_tokens`` and ``batch`` of its prompts; ``new_tokens``,
            ``temperature``, ``top_p`` and ``seed`` of what it writes; and ``progress``.
    """
    from shearling.evaluate.degeneration import NEW_TOKENS, Beginnings, degeneration

    counts = {"prompts": "count", "prompt_tokens": "tokens", "batch": "batch"}
    beginnings = {name: options.pop(key) for key, name in counts.items() if key in options}
    drawn = {key: options.pop(key) for key in ("temperature", "top_p", "seed") if key in options}
    figures = degeneration(
        model, tokenizer, documents, Beginnings(**beginnings),
        Sampling(options.pop("new_tokens", NEW_TOKENS), **drawn), **options,
    )  # fmt: skip
    return {"kind": "degeneration"} | stamp(subject) | {"text": name} | figures


def generate_samples(
    checkpoint: Any,
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
    return (
        {"kind": "generations"}
        | stamp(checkpoint)
        | {
            "sampling": sampling.as_json(),
            "max_new_tokens": sampling.max_new_tokens,
            "samples": samples,
        }
    )


def memory_needed(subject: Any, *, dtype: str, device: str = "cpu") -> int:
    """Bytes that a model's weights, computing in ``dtype``, and its logits take.

    Raises:
        ShearlingError: an unknown dtype, or more bytes than are free.
    """
    if dtype not in DTYPES:
        raise ShearlingError(f"The dtype {dtype!r} is not known here; give {', '.join(DTYPES)}.")
    logits = 2 * LOGITS_BYTES  # the logits and their exponentials
    check_fits(subject, dtype, extra_bytes=logits, device=device)
    return loaded_bytes(Path(subject.path), DTYPES[dtype]) + logits
