"""How a text begins that a model writes itself: what all begin with, and what sets each apart.

Behind BOS a model begins texts by its own distribution. Without one, an even draw among its words
stands first, as in LLM-QAT (Liu et al., arXiv 2305.17888). A chat template opens a user's turn,
which the model then fills, as in Magpie (Xu et al., arXiv 2406.08464). A real text lends a few
tokens from anywhere in its documents, all documents alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Generator
from transformers import PreTrainedTokenizerBase

from shearling.data.bos import opening
from shearling.engine.sampling import PREFIX
from shearling.errors import ShearlingError
from shearling.model.templates import render_chat

STRETCH = 64  # characters that are tokenised for PREFIX tokens; four times what English needs
_SAID = "\x02said\x03"  # stands for what a user says


@dataclass(frozen=True)
class TextStarts:
    """The beginnings of texts, told apart by their number.

    Attributes:
        tokenizer: of the model that writes.
        vocab: how many tokens the model knows; a tokenizer may have more, or fewer.
        head: tokens that all begin with: BOS, or a template's up to what a user says.
        texts: documents of which each lends a few tokens, in turns; none for none.
        template: whether the head is a template's.
        bos: the token that stands before each text, if any, and is no part of it.
    """

    tokenizer: PreTrainedTokenizerBase
    vocab: int
    head: tuple[int, ...]
    texts: Sequence[str] = ()
    template: bool = False
    bos: int | None = None

    @staticmethod
    def of(
        tokenizer: PreTrainedTokenizerBase, vocab: int, *, texts: Sequence[str] = (),
        bos: bool | None = None, template: bool = False,
    ) -> TextStarts:  # fmt: skip
        """The beginnings that a tokenizer allows.

        Raises:
            ShearlingError: a BOS or a template is asked for and there is none, or no text of
                ``texts`` has enough tokens.
        """
        begin = opening(tokenizer, bos)
        head = () if begin is None else (begin,)
        if template:
            asked = _before_the_user(tokenizer)
            head += asked[asked[:1] == head :] if head else asked
        made = TextStarts(tokenizer, vocab, head, texts, template, begin)
        if texts and not any(made._lent(text, torch.Generator()) for text in texts):
            raise ShearlingError(
                f"no document of the text to begin from has {PREFIX} tokens; give longer ones."
            )
        return made

    @property
    def length(self) -> int:
        """Tokens of each."""
        lent = PREFIX if self.texts else 0
        return len(self.head) + (lent or (0 if self.head else 1))

    def tokens(self, number: int, generator: Generator) -> list[int]:
        """The tokens with which text ``number`` begins; the generator is this text's own."""
        if not self.texts:
            return [*self.head, *([] if self.head else [self._any_word(generator)])]
        for further in range(len(self.texts)):
            lent = self._lent(self.texts[(number + further) % len(self.texts)], generator)
            if lent:
                return [*self.head, *lent]
        raise AssertionError("one of the texts has enough tokens, or there were no beginnings")

    def documents(self, ids: Sequence[int]) -> list[str]:
        """The texts that a sequence of tokens is, without what no text says.

        A special token ends a text, and behind it another begins. Of a template, whose turns are
        such tokens, all is one text that keeps them. BOS is left to who reads it.
        """
        if self.template:
            return self._said([ids[list(ids[:1]) == [self.bos] :]])
        pieces: list[list[int]] = [[]]
        for token in ids:
            if token in self._special:
                pieces.append([])
            else:
                pieces[-1].append(token)
        return self._said(pieces)

    def _said(self, pieces: Sequence[Sequence[int]]) -> list[str]:
        """Tokens as text; where the end cut a character in two, its half is left out."""
        known = [[token for token in piece if token < len(self.tokenizer)] for piece in pieces]
        texts = self.tokenizer.batch_decode(known, clean_up_tokenization_spaces=False)
        texts[-1] = texts[-1].rstrip("\ufffd")
        return [text for text in texts if text.strip()]

    @cached_property
    def _special(self) -> set[int]:
        """Tokens that are no text: ends, beginnings, marks of turns."""
        added: dict[int, Any] = self.tokenizer.added_tokens_decoder
        marked = {number for number, token in added.items() if token.special}
        return marked | set(self.tokenizer.all_special_ids)

    @cached_property
    def _words(self) -> list[int]:
        """Tokens that are text by themselves."""
        ids = [n for n in range(min(self.vocab, len(self.tokenizer))) if n not in self._special]
        texts = self.tokenizer.batch_decode([[n] for n in ids])
        return [n for n, text in zip(ids, texts, strict=True) if text and "\ufffd" not in text]

    def _any_word(self, generator: Generator) -> int:
        return self._words[int(torch.randint(len(self._words), (1,), generator=generator))]

    def _lent(self, text: str, generator: Generator) -> list[int]:
        """PREFIX neighbouring tokens from anywhere in a text; none if it has fewer."""
        most = max(0, len(text) - STRETCH)
        start = int(torch.randint(most + 1, (1,), generator=generator))
        stretch = text[start : start + STRETCH]
        ids = self.tokenizer(stretch, add_special_tokens=False, verbose=False)["input_ids"]
        ids = ids[1:] if start else ids  # the first may be half a word
        return ids[:PREFIX] if len(ids) >= PREFIX else []


def _before_the_user(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens of the chat template up to what a user says."""
    if not tokenizer.chat_template:
        raise ShearlingError(
            "--template was given, but this model's tokenizer has no chat template; leave it out."
        )
    try:
        said, mark, _ = render_chat(tokenizer, [{"role": "user", "content": _SAID}]).partition(
            _SAID
        )
    except Exception as error:  # whatever a template raises
        raise ShearlingError(
            f"--template was given, but the chat template cannot be used ({error}); leave it out."
        ) from error
    if not mark or not said:
        raise ShearlingError(
            "--template was given, but the chat template puts nothing before what a user says; "
            "leave it out."
        )
    return tuple(tokenizer(said, add_special_tokens=False, verbose=False)["input_ids"])
