"""The token with which a text begins (BOS), for models that were trained with one.

Such a model has never seen a text without it: its attention rests on that token, and without it
every prediction of a window is off (Gemma 3 270M on WikiText-2: a perplexity of 76, with it 28).
So wherever text becomes windows of tokens, each window begins with it, as in llama.cpp's
perplexity and lm-eval's rolling windows. Whether there is one is the tokenizer's to say; a user may
say otherwise. It is never predicted.

Shapes: N windows of S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from shearling.errors import ShearlingError


@dataclass(frozen=True, slots=True)
class TokenWindows:
    """Windows of a text, all of one length.

    Attributes:
        ids_NS: tokens (N, S).
        bos: the token with which each of them begins; None where they begin anywhere in the text.
    """

    ids_NS: Tensor
    bos: int | None = None

    @staticmethod
    def of(text_NT: Tensor, bos: int | None) -> TokenWindows:
        """Tokens of text (N, T), with ``bos`` before each row: S is T + 1, or T without one."""
        if bos is None:
            return TokenWindows(text_NT)
        return TokenWindows(torch.cat([text_NT.new_full((len(text_NT), 1), bos), text_NT], 1), bos)

    def __len__(self) -> int:
        """How many windows there are."""
        return len(self.ids_NS)


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer by default puts its BOS before a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos]


def opening(tokenizer: PreTrainedTokenizerBase, bos: bool | None = None) -> int | None:
    """The token with which a text begins, or None.

    Args:
        tokenizer: of the model that is to read the text.
        bos: whether there is to be one; None follows the tokenizer.

    Raises:
        ShearlingError: one is asked for, and the tokenizer has none.
    """
    if bos is False or (bos is None and not adds_bos(tokenizer)):
        return None
    if tokenizer.bos_token_id is None:
        raise ShearlingError(
            "A BOS token was asked for before each window (--bos), but this tokenizer has none; "
            "leave it out."
        )
    return tokenizer.bos_token_id
