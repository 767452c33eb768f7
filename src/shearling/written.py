"""Calibration text from the source model itself, each piece from a few tokens of a real one.

Rewritten copies (shearling.augment) stay on the calibration text's subjects; what the model writes
freely covers what else it knows. On SmolLM2 it took a cut model from 57.0 to 53.9 perplexity on a
domain that the calibration text is not of (LOG.md, 2026-11-22). Calibration on a model's own text
goes back to Williams et al., arXiv 2410.17170.

Shapes: N sequences of P tokens to start from, S in the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from shearling.checkpoint import Checkpoint
from shearling.evaluate.loading import load_model
from shearling.progress import Progress, silent

PREFIX = 4  # tokens of the real text: enough for a subject, too few to bind the rest
CACHE_BYTES = 2 * 2**30  # of keys and values alive at once


@torch.inference_mode()
def write(
    checkpoint: Checkpoint,
    ids_NS: Tensor,
    sequences: int,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> Tensor:
    """Sequences that the model writes, each from ``PREFIX`` neighbouring tokens of a window.

    The model is held in memory and run by transformers' own generation, every token drawn from
    the model's whole distribution; an end of text does not end a sequence, as in packed text.

    Args:
        checkpoint: the model that writes.
        ids_NS: windows (N, S) of real text.
        sequences: how many to write.
        seed: of every draw.
        progress: told the tokens done.

    Returns:
        Tokens (sequences, S).
    """
    length = ids_NS.shape[1]
    prefix = min(PREFIX, length)
    if sequences == 0 or prefix == length:
        return ids_NS[:0]
    model: Any = load_model(checkpoint.path)  # its generate() is typed as a tensor
    settings = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=length - prefix,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model.generation_config = settings
    rows = max(1, CACHE_BYTES // (_cached_bytes(checkpoint) * length))
    batches = _starts(ids_NS, sequences, prefix, seed).split(rows)
    found = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number, start_BP in enumerate(batches):
            count = _Count(progress, number * (length - prefix), len(batches) * (length - prefix))
            found.append(
                model.generate(
                    start_BP,
                    attention_mask=torch.ones_like(start_BP),
                    generation_config=settings,
                    stopping_criteria=StoppingCriteriaList([count]),
                )
            )
    return torch.cat(found)


def _starts(ids_NS: Tensor, sequences: int, prefix: int, seed: int) -> Tensor:
    """Neighbouring tokens (sequences, prefix), from all windows alike and anywhere in them."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(sequences) % len(ids_NS)
    first = torch.randint(ids_NS.shape[1] - prefix + 1, (sequences, 1), generator=generator)
    return ids_NS[rows[:, None], first + torch.arange(prefix)]


def _cached_bytes(checkpoint: Checkpoint) -> int:
    """Keys and values of one token, in float32."""
    shape = checkpoint.shape
    heads = shape.get("kv_heads") or shape["heads"]
    return 4 * 2 * shape["layers"] * heads * shape["head_dim"]


class _Count(StoppingCriteria):
    """Tells how far generation is, and never stops it."""

    def __init__(self, progress: Progress, done: int, total: int) -> None:
        self.progress, self.done, self.total = progress, done, total

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self.done += 1
        self.progress("writing calibration text", self.done, self.total)
        return torch.zeros(len(input_ids), dtype=torch.bool)
