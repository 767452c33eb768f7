"""How much a model's own text repeats itself, which perplexity may not show.

Legend: N prompts, B prompts at a time, P tokens of a prompt, S tokens of prompt and continuation,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from shearling.data.text import evaluation_windows
from shearling.errors import ShearlingError
from shearling.evaluate.generation import choose_token, end_tokens
from shearling.files.progress import Progress, silent
from shearling.model.loading import check_positive, longest_input

BATCH = 16
ORDERS = (1, 2, 3)
REPEATED = 4  # the order of "rep-4"
LOOPS = 3  # how often a period has to stand at the end to be a loop
CHARACTERS_PER_TOKEN = 12  # so much of a document is tokenised for each token wanted of it


def degeneration(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    prompts: int = 64,
    prompt_tokens: int = 32,
    new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch: int = BATCH,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Figures of repetition of a model's continuations, and of the text's own.

    The prompts are the first tokens of the first documents that are long enough; where these are
    too few, the beginnings of windows spread evenly over the whole text.

    Returns:
        ``prompts`` (how many there were), ``prompt_tokens``, ``new_tokens``, ``sampling``, the
        figures of :func:`repetition`, and as ``reference`` those of the text.

    Raises:
        ShearlingError: a setting out of range, too short a text, or a continuation beyond the
            model's positions.
    """
    check_positive(prompts=prompts, prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch)
    length, limit = prompt_tokens + new_tokens, longest_input(model.config)
    if limit is not None and length > limit:
        raise ShearlingError(
            f"A prompt of {prompt_tokens} tokens and {new_tokens} new ones are longer than the "
            f"model's {limit} positions; ask for fewer."
        )
    rows_NS = held_out(documents, tokenizer, prompts, length)
    written = continue_all(
        model, tokenizer, rows_NS[:, :prompt_tokens], new_tokens=new_tokens,
        temperature=temperature, top_p=top_p, seed=seed, batch=batch, progress=progress,
    )  # fmt: skip
    sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
    return {
        "prompts": len(rows_NS),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "sampling": sampling if temperature else {"method": "greedy"},
        **repetition(written),
        "reference": repetition(rows_NS[:, prompt_tokens:].tolist()),
    }


def held_out(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, count: int, length: int
) -> torch.Tensor:
    """Token ids (N, S): beginnings of documents, or windows spread over the text; N <= ``count``.

    Raises:
        ShearlingError: the text is shorter than one window.
    """
    found: list[list[int]] = []
    for document in documents:
        head = document[: length * CHARACTERS_PER_TOKEN]
        ids = tokenizer(head, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= length:
            found.append(list(ids[:length]))
        if len(found) == count:
            return torch.tensor(found)
    windows_WS = evaluation_windows(documents, tokenizer, window=length)
    step = max(1, len(windows_WS) // count)
    return windows_WS[::step][:count]


@torch.inference_mode()
def continue_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts_NP: torch.Tensor,
    *,
    new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch: int = BATCH,
    progress: Progress = silent,
) -> list[list[int]]:
    """Continuations of prompts of one length, each up to the model's end token, without it.

    Each has a generator of its own from ``seed``, so that it is what
    :func:`shearling.evaluate.generation.generate` writes for its prompt alone.
    """
    ends = end_tokens(model, tokenizer)
    written: list[list[int]] = [[] for _ in prompts_NP]
    total = -(-len(prompts_NP) // batch) * new_tokens
    done = 0
    for start in range(0, len(prompts_NP), batch):
        feed_BT = prompts_NP[start : start + batch].to(model.device)
        rows = written[start : start + len(feed_BT)]
        draws = [torch.Generator().manual_seed(seed) for _ in rows]
        cache, live = DynamicCache(config=model.config), set(range(len(rows)))
        for step in range(new_tokens):
            progress("continuing prompts", done + step, total)
            logits_BV = model(
                feed_BT, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits[:, -1]
            tokens = [0] * len(rows)  # a row that has ended goes on with anything, unread
            for row in sorted(live):
                token = choose_token(logits_BV[row].float().cpu(), temperature, top_p, draws[row])
                if token in ends:
                    live.discard(row)
                else:
                    rows[row].append(token)
                    tokens[row] = token
            if not live:
                break
            feed_BT = torch.tensor(tokens, device=model.device)[:, None]
        done += new_tokens
    progress("continuing prompts", total, total)
    return written


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
