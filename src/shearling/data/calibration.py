"""Calibration text: documents and conversations of several sources, as windows of tokens.

Conversations stand as the model's own chat template has them, like what it was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from shearling.data.bos import TokenWindows, opening
from shearling.data.documents import UnrenderedChat, documents_and_conversations, first_records
from shearling.data.encode import messages_of, render
from shearling.data.seeds import folded
from shearling.data.sources import TextSource, dealt, mixed_order
from shearling.data.text import calibration_windows
from shearling.errors import ShearlingError

ADVICE = "give a model that has one, as instruct models do, or documents"
# Of very many conversations so many are drawn, more where windows need more: rendering takes time.
CONVERSATIONS = 2048
TOKENS_EACH = 16  # at least, of a conversation
FIRST = 16  # records of a source that are looked at before work is done


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """How windows are drawn.

    Attributes:
        samples, length: how many, and the tokens of each.
        seed: of every choice.
        bos: whether each begins with BOS; None follows the tokenizer.
    """

    samples: int
    length: int
    seed: int
    bos: bool | None = None


def mixed_windows(
    sources: Sequence[TextSource], tokenizer: PreTrainedTokenizerBase, drawing: Drawing
) -> TokenWindows:
    """Windows (samples, length) of all sources by their shares, in the order of `origins`.

    The only source gives what :func:`shearling.data.text.calibration_windows` draws of it.

    Raises:
        ShearlingError: a source cannot be read, holds too little, gives no window by its share, or
            has conversations that the tokenizer has no template for.
    """
    if len(sources) == 1:
        return _windows(sources[0], tokenizer, drawing, drawing.samples, drawing.seed)
    drawn: list[TokenWindows] = []
    for number, count in enumerate(dealt(sources, drawing.samples)):
        seed = folded(drawing.seed * 1_000_003 + number)
        try:
            drawn.append(_windows(sources[number], tokenizer, drawing, count, seed))
        except ShearlingError as error:
            raise ShearlingError(f"calibration source {sources[number].name}: {error}") from error
    following = [iter(one.ids_NS) for one in drawn]
    order = origins(sources, drawing.samples, drawing.seed)
    return TokenWindows(torch.stack([next(following[source]) for source in order]), drawn[0].bos)


def origins(sources: Sequence[TextSource], samples: int, seed: int) -> tuple[int, ...]:
    """The number of the source that each window is of."""
    return mixed_order(dealt(sources, samples), folded(seed))


def all_documents(
    sources: Sequence[TextSource], tokenizer: PreTrainedTokenizerBase, *, bos: bool | None = None
) -> list[str]:
    """Of all sources, one after the other; see :func:`source_documents`."""
    return [text for one in sources for text in source_documents(one, tokenizer, bos=bos)]


def check_sources(
    sources: Sequence[TextSource], tokenizer: Callable[[], PreTrainedTokenizerBase]
) -> None:
    """Refuse what the first records of each source show already, before work is done.

    Args:
        sources: of the text.
        tokenizer: gives that of the model; asked for conversations alone.

    Raises:
        ShearlingError: a source that cannot be read or is empty, or has conversations that the
            tokenizer has no template for.
    """
    for one in sources:
        try:
            read = first_records(one.file, FIRST)
            chat = next((each for each in read if isinstance(each, UnrenderedChat)), None)
            if chat is not None:
                render(tokenizer(), messages_of(chat.chat), where=chat.where, advice=ADVICE)
        except ShearlingError as error:
            if len(sources) == 1:
                raise
            raise ShearlingError(f"calibration source {one.name}: {error}") from error


def source_documents(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    bos: bool | None = None,
    most: int | None = None,
    seed: int = 0,
) -> list[str]:
    """The documents of a source, conversations as the chat template has them.

    A BOS with which a template begins is left out where windows begin with one anyway.

    Args:
        source: where they are.
        tokenizer: of the model that is to read them.
        bos: whether windows begin with BOS; None follows the tokenizer.
        most: so many conversations are drawn at most; all, if not given.
        seed: of that draw.

    Raises:
        ShearlingError: it cannot be read, or there is no template, or one that refuses.
    """
    read = documents_and_conversations(source.file)
    begin = tokenizer.bos_token if opening(tokenizer, bos) is not None else None
    if not any(isinstance(one, UnrenderedChat) for one in read):
        return [one for one in read if isinstance(one, str)]
    texts = []
    for one in _some(read, most, seed):
        if isinstance(one, UnrenderedChat):
            text = render(tokenizer, messages_of(one.chat), where=one.where, advice=ADVICE).rstrip()
            texts.append(text.removeprefix(str(begin)) if begin else text)
        else:
            texts.append(one)
    return texts


def _windows(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    drawing: Drawing,
    samples: int,
    seed: int,
) -> TokenWindows:
    most = max(CONVERSATIONS, samples * drawing.length // TOKENS_EACH)
    texts = source_documents(source, tokenizer, bos=drawing.bos, most=most, seed=seed)
    return calibration_windows(
        texts, tokenizer, samples=samples, length=drawing.length, seed=seed, bos=drawing.bos
    )


def _some(
    read: list[str | UnrenderedChat], most: int | None, seed: int
) -> list[str | UnrenderedChat]:
    """All documents, and of the conversations so many, drawn, where they stand."""
    at = [number for number, one in enumerate(read) if isinstance(one, UnrenderedChat)]
    if most is None or len(at) <= most:
        return read
    drawn = np.random.default_rng(seed).choice(len(at), most, replace=False)
    chosen = {at[int(i)] for i in drawn}
    return [one for number, one in enumerate(read) if isinstance(one, str) or number in chosen]
