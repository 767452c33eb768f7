"""Where text that an instruct model writes itself begins: behind its chat template.

Such a model was trained on turns of a conversation, and a text that it continues from a few words
never shows what it does in one. Each opening is the template up to where the assistant answers:
behind a user's turn of the calibration text's conversations, or where there are none, behind the
first tokens of a document.

Shapes: N sequences of S tokens in the end, of which the last T are not prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from shearling.data.bos import opening
from shearling.data.documents import UnrenderedChat, documents_and_conversations
from shearling.data.encode import Messages, answer_opening, messages_of
from shearling.data.seeds import folded
from shearling.data.sources import TextSource, by_largest_remainder, exact_shares, mixed_order
from shearling.engine.moments import HELD_OUT, held_rows
from shearling.errors import ShearlingError

WrittenFrom = Literal["text", "template", "both"]
USER_TOKENS = 16  # of a document, as a user's turn
CHARACTERS = 40 * USER_TOKENS  # of it that are tokenised for that
ROOM = 2  # a sequence is this many times as long as what it begins with, or longer
LEAST = 5  # tokens of an opening, as many as a sequence from the text begins with


@dataclass(frozen=True, slots=True)
class Openings:
    """What sequences begin with.

    Attributes:
        prompts: token ids.
        every: whether all sequences begin with one, or half of them.
    """

    prompts: tuple[tuple[int, ...], ...]
    every: bool

    def put(self, written_NS: Tensor, windows: int, prefix: int) -> Tensor:
        """Write openings into the sequences that have one.

        A sequence that belongs to a held-out window has another opening than all that are fitted
        on, as far as there are several.

        Args:
            written_NS: what sequences begin with so far; changed in place.
            windows: of the text; sequence n belongs to window n modulo ``windows``.
            prefix: tokens that sequences have anyway.

        Returns:
            Which tokens behind the prefix are given (N, T).
        """
        sequences, length = written_NS.shape
        given_NT = torch.zeros(sequences, length - prefix, dtype=torch.bool)
        held_N = held_rows(sequences, windows)
        held = self.prompts[HELD_OUT - 1 :: HELD_OUT]
        others = [p for n, p in enumerate(self.prompts) if n % HELD_OUT != HELD_OUT - 1]
        following = {True: cycle(held or self.prompts), False: cycle(others or self.prompts)}
        for row in behind_template(sequences, windows, every=self.every).nonzero().flatten():
            prompt = next(following[bool(held_N[row])])
            written_NS[row, : len(prompt)] = torch.tensor(prompt)
            given_NT[row, : len(prompt) - prefix] = True
        return given_NT


def behind_template(sequences: int, windows: int, *, every: bool) -> Tensor:
    """Which sequences have an opening (N): half of those fitted on, and half of those held out.

    Those of one window take turns.
    """
    if every:
        return torch.ones(sequences, dtype=torch.bool)
    window_N, turn_N = torch.arange(sequences) % windows, torch.arange(sequences) // windows
    held_before_N = window_N // HELD_OUT
    place_N = torch.where(
        held_rows(sequences, windows), held_before_N, window_N - held_before_N
    )  # fmt: skip
    return (place_N + turn_N) % 2 == 1


def check_written_from(given: str) -> WrittenFrom:
    """The same (ShearlingError for what written text cannot begin with)."""
    known = get_args(WrittenFrom)
    if given not in known:
        raise ShearlingError(
            f"text that the model writes was to begin from {given!r} (--written-from); choose one "
            f"of {', '.join(known)}."
        )
    return cast(WrittenFrom, given)


def require_template(tokenizer: Any) -> None:
    """Raise ShearlingError unless a tokenizer has a chat template to write behind."""
    if not tokenizer.chat_template:
        raise ShearlingError(
            "text that the model writes was to begin behind its chat template (--written-from), "
            "but its tokenizer has none; take --written-from text, or a model that has one."
        )


def openings_of(
    sources: Sequence[TextSource],
    tokenizer: Any,
    sequences: int,
    length: int,
    *,
    seed: int,
    bos: bool | None,
    every: bool,
) -> Openings:
    """Openings for so many sequences of a length.

    Args:
        sources: the calibration text.
        tokenizer: of the model that writes, with a chat template.
        sequences, length: how many there are, and their tokens.
        seed: of the choice of conversations or documents.
        bos: whether sequences begin with BOS; None follows the tokenizer.
        every: whether all of them begin so, or half.

    Raises:
        ShearlingError: there is no template, it refuses, or no opening is short enough.
    """
    require_template(tokenizer)
    wanted = sequences if every else -(-sequences // 2) + 1
    prompting = _Prompting(tokenizer, opening(tokenizer, bos), length // ROOM)
    made = (prompting.of(turn) for turn in _turns(sources, tokenizer, wanted, seed))
    prompts = tuple(islice((tuple(one) for one in made if one is not None), wanted))
    if not prompts:
        raise ShearlingError(
            "text that the model writes was to begin behind its chat template (--written-from), "
            f"but of {length} tokens a sequence that would take more than half; give a larger "
            "--length, or take --written-from text."
        )
    return Openings(prompts, every)


def _turns(
    sources: Sequence[TextSource], tokenizer: Any, wanted: int, seed: int
) -> Iterator[Messages]:
    """Conversations that end with a user's turn, in random order."""
    read = [documents_and_conversations(source.file) for source in sources]
    chats = [one for of_source in read for one in of_source if isinstance(one, UnrenderedChat)]
    rng = np.random.default_rng(folded(seed))
    if chats:
        for number in rng.permutation(len(chats)):
            messages = messages_of(chats[int(number)].chat)
            users = [turn for turn, one in enumerate(messages) if one["role"] == "user"]
            if users:
                yield messages[: users[0] + 1]
        return
    counts = by_largest_remainder(exact_shares(sources), wanted)
    orders = [iter(rng.permutation(len(of_source))) for of_source in read]
    for source in mixed_order(counts, folded(seed)):
        number = next(orders[source], None)
        if number is None:  # fewer documents than turns
            text = _somewhere(str(read[source][int(rng.integers(len(read[source])))]), rng)
        else:
            text = str(read[source][int(number)])[:CHARACTERS]
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        said = str(tokenizer.decode(ids[:USER_TOKENS])).strip()
        if said:
            yield [{"role": "user", "content": said}]


def _somewhere(document: str, rng: np.random.Generator) -> str:
    """A piece of a document from the beginning of a line, or of a word where there are no lines."""
    at = int(rng.integers(len(document)))
    ends = (document.find(sign, at) for sign in ("\n", " "))
    start = next((end + 1 for end in ends if end >= 0), 0)
    return document[start : start + CHARACTERS]


@dataclass(frozen=True, slots=True)
class _Prompting:
    """How a conversation becomes an opening.

    Attributes:
        tokenizer: with a chat template.
        begin: the token with which windows begin, if they do.
        room: tokens of an opening at most.
    """

    tokenizer: Any
    begin: int | None
    room: int

    def of(self, messages: Messages) -> list[int] | None:
        """Token ids; the user's turn is shortened where there is no room; None if that fails."""
        for conversation in (messages, messages[-1:]):  # without what the system says
            ids = self._ids(conversation)
            if len(ids) > self.room:
                said = self._tokens(messages[-1]["content"])
                left = said[: max(0, len(said) - (len(ids) - self.room))]
                if not left:
                    continue
                shorter = {"role": "user", "content": str(self.tokenizer.decode(left))}
                ids = self._ids([*conversation[:-1], shorter])
            if LEAST <= len(ids) <= self.room:
                return ids
        return None

    def _ids(self, messages: Messages) -> list[int]:
        text = answer_opening(self.tokenizer, messages)
        if self.begin is None:
            return self._tokens(text)
        return [self.begin, *self._tokens(text.removeprefix(str(self.tokenizer.bos_token)))]

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
