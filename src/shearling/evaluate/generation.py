"""Text a model writes, so that a person can read what a number hides.

Legend: T tokens fed at once, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from shearling.data.seeds import LARGEST
from shearling.errors import ShearlingError, in_words
from shearling.files.progress import Progress, silent
from shearling.model.loading import check_positive, longest_input
from shearling.model.templates import render_chat


@dataclass(frozen=True)
class Sampling:
    """How the next token is taken.

    Attributes:
        max_new_tokens: written at most.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_p: sample among the likeliest tokens whose probabilities first reach this sum; 1 takes
            all.
        seed: of the draws.

    Raises:
        ShearlingError: a setting out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def as_json(self) -> dict[str, Any]:
        """For result files: greedy, or how tokens are drawn."""
        if not self.temperature:
            return {"method": "greedy"}
        return {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}

    def __post_init__(self) -> None:
        """Refuse what cannot be sampled with."""
        check_positive(max_new_tokens=self.max_new_tokens)
        if not 0 <= self.temperature < float("inf"):
            raise ShearlingError(
                f"temperature is {self.temperature}, but it must be 0 (greedy) or more."
            )
        if not 0 < self.top_p <= 1:
            raise ShearlingError(f"top_p is {self.top_p}, but it must be above 0 and at most 1.")
        if not 0 <= self.seed <= LARGEST:
            raise ShearlingError(f"seed is {self.seed}, but it must be from 0 to {LARGEST}.")


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: Sampling | None = None,
    *,
    chat: bool = False,
    progress: Progress = silent,
) -> list[dict]:
    """Continue each prompt, until the model ends the text or so many tokens are written.

    Nothing of the checkpoint's own sampling defaults is used but its end tokens. A continuation is
    a function of the model, its prompt and the seed, not of the other prompts.

    Args:
        sampling: how each token is taken, and how many at most; 64 likeliest ones with None.
        chat: ask each prompt as a user's message, in the tokenizer's chat template; else it is
            tokenised as the tokenizer does by default (special tokens included).

    Returns:
        ``{"prompt": …, "text": …}`` each, ``text`` being the continuation alone.

    Raises:
        ShearlingError: a prompt without tokens, or one that with its
            continuation is longer than the model's positions.
    """
    sampling = sampling or Sampling()
    new = sampling.max_new_tokens
    encoded = [encode(model, tokenizer, prompt, new, chat=chat) for prompt in prompts]
    samples = []
    for i, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
        progress("generating", i, len(prompts))
        written = list(new_tokens(model, tokenizer, ids, sampling))
        samples.append({"prompt": prompt, "text": continuation(tokenizer, ids, written)})
    progress("generating", len(prompts), len(prompts))
    return samples


@torch.inference_mode()
def new_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    sampling: Sampling,
) -> Generator[int]:
    """Yield each token as soon as it is chosen; the token that ends the text is not yielded.

    The first costs a forward over all of ``ids``, every other one a step through the KV cache.

    Raises:
        ShearlingError: the model computes logits that are not numbers.
    """
    ends = end_tokens(model, tokenizer)
    generator = torch.Generator().manual_seed(sampling.seed)
    cache, feed = DynamicCache(config=model.config), list(ids)
    for _ in range(sampling.max_new_tokens):
        feed_1T = torch.tensor([feed], device=model.device)
        output = model(feed_1T, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits_V = output.logits[0, -1].float().cpu()
        token = choose_token(logits_V, sampling.temperature, sampling.top_p, generator)
        if token in ends:
            return
        yield token
        feed = [token]


def encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    new: int,
    *,
    chat: bool = False,
) -> list[int]:
    """The tokens of a prompt that ``new`` more are to follow; see :func:`generate`."""
    if chat:
        prompt = _as_message(tokenizer, prompt)
    # A chat template writes its special tokens itself.
    ids = tokenizer(prompt, add_special_tokens=not chat, verbose=False)["input_ids"]
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise ShearlingError(
            f"The prompt {prompt!r} has no tokens, and the tokenizer no BOS token to start from; "
            f"give a prompt with text."
        )
    limit = longest_input(model.config)
    if limit is not None and len(ids) + new > limit:
        raise ShearlingError(
            f"A prompt of {len(ids)} tokens and {new} new ones are longer than the model's {limit} "
            f"positions; give a shorter prompt or fewer new tokens."
        )
    return ids


def continuation(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], written: Sequence[int]
) -> str:
    """The new text alone; decoded after its prompt, so that a leading space is not lost."""

    def decode(tokens: list[int]) -> str:
        return str(
            tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    prompt, whole = decode(list(ids)), decode([*ids, *written])
    return whole[len(prompt) :] if whole.startswith(prompt) else decode(list(written))


def _as_message(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    if not tokenizer.chat_template:
        raise ShearlingError(
            "The tokenizer has no chat template to ask the prompt in; ask it as plain text."
        )
    message = [{"role": "user", "content": prompt}]
    with in_words(
        lambda why: (
            f"The tokenizer's chat template cannot render a prompt ({why}); mend it, or "
            "ask the prompt as plain text."
        )
    ):
        return render_chat(tokenizer, message, ask=True)


def choose_token(
    logits_V: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator
) -> int:
    """The next token: the likeliest, or one drawn from the nucleus (arXiv 1904.09751)."""
    if not logits_V.isfinite().any() or logits_V.isnan().any():
        raise ShearlingError(
            "The model computes logits that are not numbers; check its weights, or use float32."
        )
    if temperature == 0:
        return int(logits_V.argmax())
    # The maximum is subtracted first: a tiny temperature must not overflow.
    probabilities_V = ((logits_V.double() - logits_V.max()) / temperature).softmax(dim=0)
    sorted_V, tokens_V = probabilities_V.sort(descending=True, stable=True)
    # A token stays if those likelier than it do not yet reach top_p: the first always does.
    sorted_V[sorted_V.cumsum(dim=0) - sorted_V >= top_p] = 0
    return int(tokens_V[torch.multinomial(sorted_V, 1, generator=generator)])


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every token that ends a text, by the checkpoint's generation settings or its tokenizer."""
    settings = model.generation_config
    ends = settings.eos_token_id if settings is not None else None
    listed = ends if isinstance(ends, list) else [ends]
    return {token for token in [*listed, tokenizer.eos_token_id] if token is not None}
