"""Perplexity: exp of the mean negative log-likelihood, in nats, of the next token.

Legend: N windows, B windows a batch, T tokens a window, C tokens a chunk, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from shearling.data.documents import documents
from shearling.data.text import evaluation_windows
from shearling.engine.products import fast_products
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.model.loading import check_positive, load_model, load_tokenizer, longest_input

LOGITS_BYTES = 256 * 2**20
BATCH_TOKENS = 4096  # more at a time makes no CPU faster and takes more memory
STAGE = "measuring perplexity"


@torch.inference_mode()
@fast_products()
def mean_nll(
    model: PreTrainedModel,
    windows: torch.Tensor,
    *,
    batch: int | None = None,
    progress: Progress = silent,
) -> tuple[float, int]:
    """The two numbers a mean negative log-likelihood is made of: its sum, and over how many tokens.

    The logits are those of the model's own forward (a soft cap included), taken as float32 and
    summed as float64. No more than ``LOGITS_BYTES`` of them exist at a time: where a batch of
    windows would give more, each is run in several parts through the model's KV cache.

    Args:
        model: a causal language model, in evaluation mode.
        windows: token ids, [N, T]; the first token of each is not predicted.
        batch: windows at a time; None takes as many as the logits' limit allows, at least one.

    Returns:
        The sum in nats, and the tokens predicted: N * (T - 1).

    Raises:
        ShearlingError: windows that hold nothing to predict, a ``batch`` below 1, or logits that
            are not numbers.
    """
    check_positive(batch=batch)
    _check_windows(windows)
    length = windows.shape[1]
    batch, chunk = _parts(model, length, batch)
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(windows), batch):
        progress(STAGE, start, len(windows))
        ids_BT = windows[start : start + batch].to(model.device)
        position = 0
        for logits_BCV in _logits(model, ids_BT[:, :-1], chunk):
            targets_BC = ids_BT[:, position + 1 : position + 1 + logits_BCV.shape[1]]
            total += _nll(logits_BCV, targets_BC)
            position += logits_BCV.shape[1]
    progress(STAGE, len(windows), len(windows))
    if not math.isfinite(total.item()):
        raise ShearlingError(
            f"The negative log-likelihood is {total.item()}: the model computes values that are "
            f"not numbers; check its weights, or use float32."
        )
    return total.item(), len(windows) * (length - 1)


def _check_windows(windows: torch.Tensor) -> None:
    if windows.ndim != 2 or len(windows) < 1 or windows.shape[1] < 2:
        raise ShearlingError(
            f"Windows of the shape {list(windows.shape)} hold nothing to predict; at least one of "
            f"two tokens is needed."
        )


@dataclass(frozen=True, slots=True)
class Windows:
    """What of a text is measured, and how.

    Attributes:
        tokens: of a window; see :func:`shearling.data.text.evaluation_windows`.
        most: windows to evaluate, from the beginning of the text; None takes all of it.
        bos: put the BOS token before each window; None follows the tokenizer.
        batch: windows at a time; None chooses.
    """

    tokens: int = 512
    most: int | None = None
    bos: bool | None = None
    batch: int | None = None


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    windows: Windows | None = None,
    *,
    progress: Progress = silent,
) -> dict:
    """Perplexity of a loaded model on documents: the figures of an ``evaluation``.

    Returns:
        ``window`` (tokens), ``windows``, ``bos``, ``tokens`` (predicted), ``nll`` (mean, nats),
        ``perplexity``, ``seconds`` (of the model alone).

    Raises:
        ShearlingError: what :func:`evaluation_windows` and :func:`mean_nll` refuse; a window that
            leaves nothing to predict or is longer than the model's positions; a perplexity that
            is no finite number.
    """
    windows = windows or Windows()
    rows = evaluation_windows(
        documents, tokenizer, window=windows.tokens, max_windows=windows.most, bos=windows.bos
    )
    rows_NT, bos = rows.ids_NS, rows.bos is not None
    _check_rows(model, rows_NT, bos=bos)
    start = time.perf_counter()
    nll_sum, tokens = mean_nll(model, rows_NT, batch=windows.batch, progress=progress)
    nll = _finite(nll_sum / tokens)
    return {
        "window": windows.tokens,
        "windows": len(rows_NT),
        "bos": bos,
        "tokens": tokens,
        "nll": nll,
        "perplexity": math.exp(nll),
        "seconds": time.perf_counter() - start,
    }


def _finite(nll: float) -> float:
    """The mean, if its perplexity is a number (ShearlingError)."""
    if nll > 700:
        raise ShearlingError(
            f"The mean negative log-likelihood is {nll:.0f} nats, beyond what any model of a text "
            f"gives, and its perplexity is not a finite number; check the model's weights."
        )
    return nll


def evaluate(
    model_path: Path | str,
    text: Path | str,
    windows: Windows | None = None,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    progress: Progress = silent,
) -> dict:
    """Perplexity of a model directory on a text file or directory of such.

    Args:
        model_path: local model directory, loaded with stock transformers, safetensors alone.
        text: what :func:`shearling.data.documents.documents` reads.
        windows: what of it is measured; by default all, 512 tokens at a time.

    Returns:
        An ``evaluation`` as in docs/files.md, without ``shearling``, ``created`` and ``model``;
        ``text`` is the name of the file or directory.

    Raises:
        ShearlingError: a model, text, or combination of them that cannot be evaluated.
    """
    windows = windows or Windows()
    check_positive(window=windows.tokens, max_windows=windows.most, batch=windows.batch)
    texts = documents(text)
    tokenizer = load_tokenizer(model_path)
    model = load_model(model_path, dtype=dtype, device=device)
    figures = perplexity(model, tokenizer, texts, windows, progress=progress)
    return {"kind": "evaluation", "text": Path(text).resolve().name, **figures}


def _check_rows(model: PreTrainedModel, rows_NT: torch.Tensor, *, bos: bool) -> None:
    """Raise ShearlingError for windows that are too long, or of tokens that the model lacks."""
    # Of a window and its BOS the last token is predicted alone, and takes no position.
    length, limit = rows_NT.shape[1] - bos, longest_input(model.config)
    if limit is not None and length > limit:
        raise ShearlingError(
            f"Windows of {length} tokens{' (BOS included)' if bos else ''} are longer than the "
            f"model's {limit} positions; give a window of at most {limit}."
        )
    largest, vocab = int(rows_NT.max()), model.config.get_text_config().vocab_size
    if largest >= vocab:
        raise ShearlingError(
            f"The text gives the token {largest}, but the model knows 0 to {vocab - 1}; put the "
            f"tokenizer that belongs to the model beside its weights."
        )


def _parts(model: PreTrainedModel, length: int, batch: int | None) -> tuple[int, int]:
    """Windows at a time, and positions of them whose logits exist at a time."""
    row_bytes = 4 * model.config.get_text_config().vocab_size
    if batch is None:
        batch = max(1, min(LOGITS_BYTES // (length * row_bytes), BATCH_TOKENS // length))
    return batch, max(1, LOGITS_BYTES // (batch * row_bytes))


def _logits(model: PreTrainedModel, ids_BT: torch.Tensor, chunk: int) -> Iterator[torch.Tensor]:
    """Logits of all positions in order, [B, C, V] with C of at most ``chunk``."""
    if ids_BT.shape[1] <= chunk:
        yield model(ids_BT, use_cache=False).logits
        return
    cache = DynamicCache(config=model.config)
    for ids_BC in ids_BT.split(chunk, dim=1):
        yield model(ids_BC, past_key_values=cache, use_cache=True).logits


def _nll(logits_BCV: torch.Tensor, targets_BC: torch.Tensor) -> float:
    """Summed negative log-likelihood: -log softmax(logits)[target], one window at a time."""
    total = 0.0
    for logits_CV, targets_C in zip(logits_BCV, targets_BC, strict=True):
        logits_CV = logits_CV.float()
        chosen_C = logits_CV.gather(1, targets_C[:, None])[:, 0]
        total += (logits_CV.logsumexp(dim=1) - chosen_C).double().sum().item()
    return total
