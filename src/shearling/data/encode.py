"""Records as token ids, with a mask of what is learned.

Legend: T tokens of a record.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
from transformers import PreTrainedTokenizerBase

from shearling.data.bos import opening
from shearling.data.records import Chat, Document, Exchange, Record
from shearling.data.text import PIECE_CHARACTERS, pieces
from shearling.errors import ShearlingError, reason
from shearling.model.templates import render_chat

Encoded = tuple[np.ndarray, np.ndarray | None]
Messages = list[dict[str, str]]

# Stands for an answer while we look where the chat template puts one; from a private-use area.
_ANSWER = "\ue0a5answer\ue0a6"


class Encoder:
    """A tokenizer, and what it does at the ends of a document.

    Every record ends with EOS. BOS stands before a document or a prompt if the tokenizer puts it
    there by default, or if ``bos`` says so; a conversation begins as its template has it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, bos: bool | None = None) -> None:
        """Raise ShearlingError if the tokenizer has no EOS, or no BOS though one is asked for."""
        if tokenizer.eos_token_id is None:
            raise ShearlingError(
                f"The tokenizer {tokenizer.name_or_path or ''} has no EOS token, which has to "
                "stand between documents; set eos_token in its tokenizer_config.json."
            )
        self.tokenizer = tokenizer
        self.eos: int = tokenizer.eos_token_id
        self.bos = opening(tokenizer, bos)

    def __call__(
        self, batch: Sequence[tuple[int, Record]], where: Callable[[int], str]
    ) -> Iterator[Encoded]:
        """Token ids int64 [T] of every record, and a bool mask [T] where not all is learned.

        Args:
            batch: records with their numbers.
            where: how to name the record of a number in an error.

        Raises:
            ShearlingError: the tokenizer or its chat template cannot take a record.
        """
        documents = [
            record.text
            for _, record in batch
            if isinstance(record, Document) and len(record.text) <= PIECE_CHARACTERS
        ]
        rows = iter(self._ids(documents))
        for number, record in batch:
            if isinstance(record, Document):
                short = len(record.text) <= PIECE_CHARACTERS
                yield self._document(next(rows) if short else self._long(record.text)), None
            elif isinstance(record, Exchange):
                # Only an error asks where, which for the middle of a file means to count its lines.
                yield self._exchange(record, partial(where, number))
            else:
                yield self._chat(record, partial(where, number))

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(
            texts, add_special_tokens=False, verbose=False,
            return_attention_mask=False, return_token_type_ids=False,
        )["input_ids"]  # fmt: skip

    def _long(self, text: str) -> list[int]:
        """A long document in pieces: a tokenizer's memory is many times its text."""
        return [i for piece in pieces(text, PIECE_CHARACTERS) for i in self._ids([piece])[0]]

    def _document(self, ids: list[int]) -> np.ndarray:
        first = [] if self.bos is None else [self.bos]
        return np.array([*first, *ids, self.eos], dtype=np.int64)

    def _exchange(self, record: Exchange, where: Callable[[], str]) -> Encoded:
        text = record.prompt + record.answer
        ids, mask = self._masked(text, [(len(record.prompt), len(text))], where)
        first = [] if self.bos is None else [False]
        return self._document(ids), np.array([*first, *mask, True], dtype=bool)

    def _chat(self, record: Chat, where: Callable[[], str]) -> Encoded:
        text, spans = answers(self.tokenizer, record, where)
        ids, mask = self._masked(text, spans, where)
        if ids[-1] != self.eos:
            # The model has to stop after an answer; after anything else there is nothing to learn.
            ids, mask = [*ids, self.eos], np.append(mask, mask[-1])
        return np.array(ids, dtype=np.int64), mask

    def _masked(
        self, text: str, spans: list[tuple[int, int]], where: Callable[[], str]
    ) -> tuple[list[int], np.ndarray]:
        """Ids of a text, and which of them hold characters of the spans."""
        if not self.tokenizer.is_fast:
            raise ShearlingError(
                f"{where()} has a prompt and an answer, but this tokenizer does not tell which "
                "characters a token stands for; save it as a fast tokenizer (tokenizer.json)."
            )
        encoded = self.tokenizer(
            text, add_special_tokens=False, verbose=False, return_offsets_mapping=True
        )
        begin, end = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
        # Of blanks some tokenizers report the end only.
        begin = np.minimum(begin, end - 1)
        mask = np.zeros(len(begin), dtype=bool)
        for start, stop in spans:
            mask |= (begin < stop) & (end > start)
        return encoded["input_ids"], mask


def answers(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, where: Callable[[], str]
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as its template has it, and where the assistant speaks: [start, stop).

    An answer begins where the template lets the assistant begin and ends with what the template
    puts after an answer, white space aside. White space at the end of the whole is left out.

    Raises:
        ShearlingError: there is no template, it refuses the conversation, or an answer cannot be
            found in what it makes of it.
    """
    advice = "give a --tokenizer that has one, or prompts with answers"
    messages = messages_of(chat)
    text = render(tokenizer, messages, where=where, advice=advice).rstrip()
    with _taken(where):
        spans = [
            _span(tokenizer, messages, turn, text)
            for turn, message in enumerate(messages)
            if message["role"] == "assistant" and message["content"].strip()
        ]
    return text, spans


def messages_of(chat: Chat) -> Messages:
    """A conversation as templates take it."""
    return [{"role": role, "content": content} for role, content in chat.messages]


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, where: Callable[[], str], advice: str
) -> str:
    """A conversation as the tokenizer's chat template has it.

    Args:
        tokenizer: with a template.
        messages: the conversation.
        where: how to name it in an error.
        advice: what would work where there is no template.

    Raises:
        ShearlingError: there is no template, or it refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise ShearlingError(
            f"{where()} is a conversation, but the tokenizer has no chat template; {advice}."
        )
    with _taken(where):
        return render_chat(tokenizer, messages)


def answer_opening(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    """A conversation as its template has it, up to where the assistant answers.

    Raises:
        ShearlingError: the template refuses it.
    """
    with _taken(lambda: "What the model is to answer"):
        asked = render_chat(tokenizer, messages, ask=True)
        if asked != render_chat(tokenizer, messages):
            return asked
        stand_in = [*messages, {"role": "assistant", "content": _ANSWER}]  # it ignores the question
        return render_chat(tokenizer, stand_in).partition(_ANSWER)[0]


@contextmanager
def _taken(where: Callable[[], str]) -> Generator[None]:
    """What a template raises, in one sentence."""
    try:
        yield
    except Exception as error:  # a template can raise whatever it likes
        raise ShearlingError(
            f"{where()} is a conversation that the tokenizer's chat template does not take "
            f"({reason(error)}); mend or leave out that record."
        ) from error


def _span(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, turn: int, text: str
) -> tuple[int, int]:
    """Where one answer lies in the text.

    Templates differ: some ignore what asks for an answer, some trim answers, some put a block of
    thought before the last answer only. So a stand-in shows what comes before and after one.
    """
    stand_in = [*messages[:turn], {"role": "assistant", "content": _ANSWER}]
    head, marker, tail = render_chat(tokenizer, stand_in).partition(_ANSWER)
    if not marker:
        raise ValueError(f"it leaves out message {turn + 1}")
    tail = tail.rstrip()
    start = len(head)
    if turn:
        asked = render_chat(tokenizer, messages[:turn], ask=True)
        if asked != render_chat(tokenizer, messages[:turn]) and text.startswith(asked):
            start = len(asked)
    content = messages[turn]["content"]
    for at in (len(head), start):
        for said in (content, content.strip()):
            if text.startswith(head[:at]) and text.startswith(said.rstrip(), at):
                stop = at + len(said.rstrip())
                after = at + len(said)
                return min(start, at), after + len(tail) if text.startswith(tail, after) else stop
    raise ValueError(f"it changes the answer in message {turn + 1}")
