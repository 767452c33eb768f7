"""Windows of tokens, cut from documents.

Legend: N windows, T tokens a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from shearling.data.bos import TokenWindows, opening
from shearling.errors import ShearlingError, count_of

# Characters of text taken for each token wanted, where not all of a text is tokenised: four times
# what English needs; a denser text only means that more is tokenised.
CHARACTERS_PER_TOKEN = 16
# Where documents have to be joined, this much of a larger collection is tokenised at least.
JOINED_CHARACTERS = 2_000_000
# A document longer than this is tokenised in pieces that end at a line's end.
PIECE_CHARACTERS = 4_000_000

SEPARATOR = "\n\n"


def calibration_windows(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    length: int,
    seed: int,
    bos: bool | None = None,
) -> TokenWindows:
    """Random windows of text for calibration, [samples, length] token ids.

    Where the tokenizer puts a BOS before a text, or ``bos`` asks for it, every window begins with
    it, and has ``length`` - 1 tokens of text; there are no other special tokens.

    The documents are taken in a random order, and each with at least that many tokens gives one
    window at a random place, until there are ``samples``. Where too few documents are that long,
    all of them, in that order, are joined (EOS between, if the tokenizer has one) and cut
    into windows that do not overlap, of which ``samples`` distinct ones are drawn. A function of
    ``seed`` and the documents alone.

    No more is tokenised than that takes: of a very long document, and of more than
    ``JOINED_CHARACTERS`` of documents to be joined, a part at a random place, which grows to the
    whole if it holds too few tokens.

    Raises:
        ShearlingError: ``samples`` or ``length`` is below 1, or has no room for a BOS and a token
            of text; the text is too short; or ``bos`` is set and the tokenizer has none.
    """
    _positive("samples", samples)
    _positive("length", length)
    begin = opening(tokenizer, bos)
    if begin is not None:
        if length < 2:
            raise ShearlingError(
                f"length is {length}, but a window begins with BOS and has at least 2 tokens."
            )
        length -= 1
    rng = np.random.default_rng(seed)
    shuffled = [documents[int(i)] for i in rng.permutation(len(documents))]
    windows: list[np.ndarray] = []
    for document in shuffled:
        ids = _enough_tokens([document], tokenizer, length, length * CHARACTERS_PER_TOKEN, rng)
        if len(ids) >= length:
            start = int(rng.integers(len(ids) - length + 1))
            windows.append(ids[start : start + length])
        if len(windows) == samples:
            return TokenWindows.of(torch.from_numpy(np.stack(windows)), begin)

    need = samples * length
    budget = max(JOINED_CHARACTERS, need * CHARACTERS_PER_TOKEN)
    ids = _enough_tokens(shuffled, tokenizer, need, budget, rng)
    if len(ids) < need:
        raise ShearlingError(
            f"The text has {count_of(len(ids), 'token')}, but {count_of(samples, 'sample')} of "
            f"{length} tokens {'needs' if samples == 1 else 'need'} {need:,}; "
            "ask for fewer samples or a shorter length, or give more text."
        )
    rows_NT = ids[: len(ids) // length * length].reshape(-1, length)
    drawn_NT = rows_NT[rng.permutation(len(rows_NT))[:samples]]
    return TokenWindows.of(torch.from_numpy(drawn_NT), begin)


def evaluation_windows(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    window: int,
    max_windows: int | None = None,
    bos: bool | None = None,
) -> TokenWindows:
    """The text from its beginning, as consecutive windows of ``window`` tokens that do not overlap.

    Every document but the last is followed by a blank line, each is tokenised on its own, that
    blank line included and without special tokens, and the tokens are put in a row and cut; the
    incomplete tail is dropped. (A document of more than ``PIECE_CHARACTERS`` is tokenised in
    pieces that end at a line's end.) Hence ``max_windows`` gives exactly the first windows of the
    whole, and no more is tokenised than it takes.

    Returns:
        Token ids, [N, window]. Where the tokenizer puts a BOS before a text, or ``bos`` asks for
        it, each window has it before it, so that all its tokens are predicted: [N, window + 1].
        The windows hold the same text either way, and a model reads ``window`` tokens, BOS
        included, as the last one is predicted alone.

    Raises:
        ShearlingError: ``window`` or ``max_windows`` is below 1, the text is shorter than one
            window, or there is no BOS token though ``bos`` is set.
    """
    _positive("window", window)
    if max_windows is not None:
        _positive("max_windows", max_windows)
    begin = opening(tokenizer, bos)
    need = None if max_windows is None else window * max_windows
    ids_by_piece: list[np.ndarray] = []
    tokens = 0
    for piece in _pieces(documents):
        ids_by_piece.append(_ids(tokenizer, piece))
        tokens += len(ids_by_piece[-1])
        if need is not None and tokens >= need:
            break
    if tokens < window:
        raise ShearlingError(
            f"The text has {count_of(tokens, 'token')}, but one window needs {window:,}; "
            "give more text or a smaller window."
        )
    ids = np.concatenate(ids_by_piece)
    rows_NT = torch.from_numpy(ids[: tokens // window * window].reshape(-1, window)[:max_windows])
    return TokenWindows.of(rows_NT, begin)


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ShearlingError(f"{name} is {value}, but it must be at least 1.")


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """Token ids of a text, no special tokens added, and no complaint about its length."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return np.asarray(ids, dtype=np.int64)


def _pieces(documents: Sequence[str]) -> Iterator[str]:
    """What evaluation tokenises at a time: documents with their separator, long ones in parts."""
    for i, document in enumerate(documents):
        text = document if i == len(documents) - 1 else document + SEPARATOR
        yield from pieces(text, PIECE_CHARACTERS)


def pieces(text: str, most: int) -> Iterator[str]:
    """A text in parts of at most so many characters, which end at a line's end if they can."""
    start = 0
    while len(text) - start > most:
        limit = start + most
        end = text.rfind("\n", start, limit) + 1 or limit
        yield text[start:end]
        start = end
    yield text[start:]


def _enough_tokens(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    need: int,
    budget: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Tokens of the joined documents, EOS between: at least ``need``, or else all there are.

    Of more than ``budget`` characters only that many are tokenised, at a random place, and four
    times as many as long as they give too few tokens.
    """
    total = sum(map(len, documents))
    while True:
        start = int(rng.integers(total - budget + 1)) if total > budget else 0
        ids_by_part: list[np.ndarray] = []
        for part in _stretch(documents, start, start + budget):
            if ids_by_part and not _ended(ids_by_part[-1], tokenizer.eos_token_id):
                ids_by_part.append(np.asarray([tokenizer.eos_token_id], dtype=np.int64))
            ids_by_part.append(_ids(tokenizer, part))
        ids = np.concatenate(ids_by_part) if ids_by_part else np.empty(0, dtype=np.int64)
        if len(ids) >= need or budget >= total:
            return ids
        budget *= 4


def _ended(ids: np.ndarray, eos: int | None) -> bool:
    """Whether no EOS is to follow: there is none, or a conversation's template has put it there."""
    return eos is None or (len(ids) > 0 and ids[-1] == eos)


def _stretch(documents: Sequence[str], start: int, stop: int) -> Iterator[str]:
    """Characters ``start`` to ``stop`` of the documents laid end to end, document by document."""
    position = 0
    for document in documents:
        begin, end = max(start - position, 0), min(stop - position, len(document))
        if begin < end:
            yield document[begin:end]
        position += len(document)
