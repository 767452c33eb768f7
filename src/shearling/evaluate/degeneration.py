"""How much a model's own text repeats itself, which perplexity may not show.

Legend: N prompts, B prompts at a time, P tokens of a prompt, S tokens of prompt and continuation,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from shearling.data.bos import TokenWindows, opening
from shearling.data.text import evaluation_windows
from shearling.errors import ShearlingError
from shearling.evaluate.generation import Sampling, choose_token, end_tokens
from shearling.files.progress import Progress, silent
from shearling.model.loading import check_positive, longest_input

BATCH, NEW_TOKENS = 16, 128
ORDERS = (1, 2, 3)
REPEATED = 4  # the order of "rep-4"
LOOPS = 3  # how often a period has to stand at the end to be a loop
CHARACTERS_PER_TOKEN = 12  # so much of a document is tokenised for each token wanted of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginnings:
    """Beginnings of a text that a model continues.

    Attributes:
        count: so many at most.
        tokens: in each.
        batch: continued at a time.
        bos: whether each follows a BOS; None follows the tokenizer.
    """

    count: int = 64
    tokens: int = 32
    batch: int = BATCH
    bos: bool | None = None


def degeneration(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    beginnings: Beginnings | None = None,
    sampling: Sampling | None = None,
    *,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Figures of repetition of a model's continuations, and of the text's own.

    The prompts are the first tokens of the first documents that are long enough; where these are
    too few, the beginnings of windows spread evenly over the whole text.

    Args:
        beginnings: what is continued.
        sampling: how; by default 128 tokens, the likeliest each time.

    Returns:
        ``prompts`` (how many there were), ``prompt_tokens`` (a BOS aside), ``bos``,
        ``new_tokens``, ``sampling``, the figures of :func:`repetition`, and as ``reference`` those
        of the text.

    Raises:
        ShearlingError: a setting out of range, too short a text, or a continuation beyond the
            model's positions.
    """
    beginnings, sampling = beginnings or Beginnings(), sampling or Sampling(NEW_TOKENS)
    head, new = beginnings.tokens, sampling.max_new_tokens
    check_positive(prompts=beginnings.count, prompt_tokens=head, batch=beginnings.batch)
    bos = opening(tokenizer, beginnings.bos)
    _check_positions(model, head + (bos is not None), new)
    rows_NS = held_out(documents, tokenizer, beginnings.count, head + new)
    prompts_NP = TokenWindows.of(rows_NS[:, :head], bos).ids_NS
    written = continue_all(
        model, tokenizer, prompts_NP, sampling, batch=beginnings.batch, progress=progress
    )
    return {
        "prompts": len(rows_NS),
        "prompt_tokens": head,
        "bos": bos is not None,
        "new_tokens": new,
        "sampling": sampling.as_json(),
        **repetition(written),
        "reference": repetition(rows_NS[:, head:].tolist()),
    }


def _check_positions(model: PreTrainedModel, head: int, new: int) -> None:
    limit = longest_input(model.config)
    if limit is not None and head + new > limit:
        raise ShearlingError(
            f"A prompt of {head} tokens and {new} new ones are longer than the model's {limit} "
            "positions; ask for fewer."
        )


def held_out(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, count: int, length: int
) -> torch.Tensor:
    """Token ids (N, S): beginnings of documents, or windows spread over the text; N <= ``count``.

    Raises:
        ShearlingError: the text is shorter than one window.
    """
    beginnings: list[list[int]] = []
    for document in documents:
        head = document[: length * CHARACTERS_PER_TOKEN]
        ids = tokenizer(head, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= length:
            beginnings.append(list(ids[:length]))
        if len(beginnings) == count:
            return torch.tensor(beginnings)
    windows_WS = evaluation_windows(documents, tokenizer, window=length, bos=False).ids_NS
    taken = min(count, len(windows_WS))
    return windows_WS[[number * len(windows_WS) // taken for number in range(taken)]]


@torch.inference_mode()
def continue_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts_NP: torch.Tensor,
    sampling: Sampling,
    *,
    batch: int = BATCH,
    progress: Progress = silent,
    finished: Callable[[Sequence[int]], bool] = lambda tokens: False,
) -> list[list[int]]:
    """Continuations of prompts of one length, each up to the model's end token, without it.

    Each has a generator of its own from the seed, so that it is what
    :func:`shearling.evaluate.generation.generate` writes for its prompt alone. One whose tokens
    so far are ``finished`` ends there.
    """
    ends = end_tokens(model, tokenizer)
    new = sampling.max_new_tokens
    total = -(-len(prompts_NP) // batch) * new
    written: list[list[int]] = []
    for number, prompts_BP in enumerate(prompts_NP.split(batch)):
        rows: list[list[int]] = [[] for _ in prompts_BP]
        steps = _steps(model, prompts_BP.to(model.device), rows, ends, sampling, finished)
        for step, _ in enumerate(steps):
            progress("continuing prompts", number * new + step, total)
        written += rows
    progress("continuing prompts", total, total)
    return written


def _steps(
    model: PreTrainedModel,
    feed_BT: torch.Tensor,
    rows: list[list[int]],
    ends: set[int],
    sampling: Sampling,
    finished: Callable[[Sequence[int]], bool],
) -> Iterator[None]:
    """Continue a batch of prompts into ``rows``, and yield before every token of all of them."""
    draws = [torch.Generator().manual_seed(sampling.seed) for _ in rows]
    cache, live = DynamicCache(config=model.config), set(range(len(rows)))
    for _ in range(sampling.max_new_tokens):
        yield
        logits_BV = model(feed_BT, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[
            :, -1
        ]
        tokens = [0] * len(rows)  # a row that has ended goes on with anything, unread
        for row in sorted(live):
            logits_V = logits_BV[row].float().cpu()
            token = choose_token(logits_V, sampling.temperature, sampling.top_p, draws[row])
            if token in ends:
                live.discard(row)
            else:
                rows[row].append(token)
                tokens[row] = token
                if finished(rows[row]):
                    live.discard(row)
        if not live:
            return
        feed_BT = torch.tensor(tokens, device=model.device)[:, None]


def repetition(continuations: Iterable[Sequence[int]]) -> dict[str, Any]:
    """Figures of repetition, of token ids.

    Returns:
        ``distinct``: n -> distinct n-grams as a share of all n-grams of all continuations (Li et
        al., arXiv 1510.03055); ``repetition_4``: the share of a continuation's 4-grams that stood
        in it before, averaged over continuations that have any (Welleck et al., arXiv
        1908.04319); ``loops``: the share of continuations whose end is one period at least three
        times over. A figure of nothing is None.
    """
    texts = [list(text) for text in continuations]
    distinct = {}
    for order in ORDERS:
        grams = [gram for text in texts for gram in _grams(text, order)]
        distinct[str(order)] = len(set(grams)) / len(grams) if grams else None
    shares = [1 - len(set(grams)) / len(grams) for t in texts if (grams := _grams(t, REPEATED))]
    return {
        "distinct": distinct,
        "repetition_4": sum(shares) / len(shares) if shares else None,
        "loops": sum(map(ends_in_a_loop, texts)) / len(texts) if texts else None,
    }


def ends_in_a_loop(text: Sequence[int]) -> bool:
    """Whether the last tokens are some period, of any length, at least three times over."""
    return any(
        list(text[-LOOPS * period :]) == list(text[-period:]) * LOOPS
        for period in range(1, len(text) // LOOPS + 1)
    )


def _grams(text: Sequence[int], order: int) -> list[tuple[int, ...]]:
    return [tuple(text[i : i + order]) for i in range(len(text) - order + 1)]
