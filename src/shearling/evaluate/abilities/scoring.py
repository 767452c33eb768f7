"""Items scored: how likely the right answer is, and what the model writes in its place.

An answer's likelihood and, as far as the likeliest token is the expected one, what a model writes
are read from one forward over the prompt with its answer. Rows are padded behind their end, where
no token that counts can see it. From the first other token on a model writes by itself, in rows of
one length, so that nothing is padded at all: figures are those of one item at a time.

Legend: B rows a batch, T tokens, K positions whose logits are kept, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shearling.data.bos import opening
from shearling.engine.products import fast_products
from shearling.errors import ShearlingError
from shearling.evaluate.abilities.items import END, Item
from shearling.evaluate.degeneration import BATCH, continue_all
from shearling.evaluate.generation import Sampling, continuation, end_tokens
from shearling.evaluate.perplexity import BATCH_TOKENS, LOGITS_BYTES
from shearling.files.progress import Progress, silent
from shearling.model.loading import check_positive, longest_input

BEYOND = 8  # tokens that a model may write beyond twice the right answer's


@dataclass(frozen=True, slots=True)
class EncodedItem:
    """An item in a model's tokens: its prompt, the answer and what ends it."""

    ids: tuple[int, ...]
    context: int  # tokens of the prompt

    @property
    def answer(self) -> tuple[int, ...]:
        """The tokens that are asked for."""
        return self.ids[self.context :]

    @property
    def most(self) -> int:
        """Tokens that are written at most."""
        return 2 * len(self.answer) + BEYOND


@dataclass(frozen=True, slots=True)
class Scored:
    """One item as one model answered it.

    Attributes:
        nll: of the answer and its end, in nats a token.
        exact: whether the line written is the answer.
        tokens: written, the end included.
        expected_tokens: of the answer, the end included.
        text: the line written.
    """

    nll: float
    exact: bool
    tokens: int
    expected_tokens: int
    text: str


def score_items(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    *,
    bos: bool | None = None,
    batch: int | None = None,
    progress: Progress = silent,
) -> list[Scored]:
    """Every item, in the order given.

    Args:
        bos: whether a BOS stands before each prompt; None follows the tokenizer.
        batch: items at a time; None goes by their length. No figure depends on it.

    Raises:
        ShearlingError: an item is longer than the model's positions, or has tokens that the model
            lacks; or the model computes logits that are not numbers.
    """
    check_positive(batch=batch)
    first = opening(tokenizer, bos)
    rows = [encode_item(tokenizer, item, first) for item in items]
    _check_rows(model, rows)
    likelihoods = _forced(model, rows, batch, progress)
    written = _written(
        model, tokenizer, rows, [likeliest for _, likeliest in likelihoods], batch or BATCH,
        progress,
    )  # fmt: skip
    scored = []
    for row, (nll, _), tokens in zip(rows, likelihoods, written, strict=True):
        text = _line(tokenizer, row, tokens)
        exact = text == _line(tokenizer, row, row.answer)
        scored.append(Scored(nll, exact, len(tokens), len(row.answer), text))
    return scored


def encode_item(tokenizer: PreTrainedTokenizerBase, item: Item, bos: int | None) -> EncodedItem:
    """An item's tokens. Those that the prompt alone would not have belong to the answer."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    prompt, whole = encode(item.prompt), encode(item.prompt + item.answer + END)
    same = (a == b for a, b in zip(prompt, whole, strict=False))
    shared = next((place for place, alike in enumerate(same) if not alike), len(prompt))
    before = [] if bos is None else [bos]
    return EncodedItem((*before, *whole), len(before) + min(shared, len(whole) - 1))


def _check_rows(model: PreTrainedModel, rows: Sequence[EncodedItem]) -> None:
    """Raise ShearlingError for rows that are too long, or of tokens that the model lacks."""
    limit = longest_input(model.config)
    longest = max((len(row.ids) - len(row.answer) + row.most for row in rows), default=0)
    if limit is not None and longest > limit:
        raise ShearlingError(
            f"An item of the abilities takes {longest} tokens with what may be written after it, "
            f"more than the model's {limit} positions; its abilities cannot be measured."
        )
    largest = max((token for row in rows for token in row.ids), default=0)
    vocab = model.config.get_text_config().vocab_size
    if largest >= vocab:
        raise ShearlingError(
            f"An item gives the token {largest}, but the model knows 0 to {vocab - 1}; put the "
            f"tokenizer that belongs to the model beside its weights."
        )


def _batches(rows: Sequence[EncodedItem], vocab: int, batch: int | None) -> Iterator[list[int]]:
    """Numbers of rows that go together: the longest first, as many as memory allows."""
    order = sorted(range(len(rows)), key=lambda n: (-len(rows[n].ids), n))
    held: list[int] = []
    for number in order:
        some = [rows[n] for n in (*held, number)]
        logits = 4 * vocab * len(some) * _kept(some)
        large = len(some) * len(some[0].ids) > BATCH_TOKENS or logits > LOGITS_BYTES
        if held and (len(held) == batch if batch else large):
            yield held
            held = []
        held.append(number)
    if held:
        yield held


def _kept(rows: Sequence[EncodedItem]) -> int:
    """Positions at the end whose logits predict the answers of some rows."""
    return max(len(row.ids) for row in rows) - min(row.context for row in rows)


@torch.inference_mode()
@fast_products()
def _forced(
    model: PreTrainedModel, rows: Sequence[EncodedItem], batch: int | None, progress: Progress
) -> list[tuple[float, list[int]]]:
    """Of each row: nats a token of its answer, and the likeliest token at each of its places."""
    likelihoods: dict[int, tuple[float, list[int]]] = {}
    for numbers in _batches(rows, model.config.get_text_config().vocab_size, batch):
        progress("scoring answers", len(likelihoods), len(rows))
        some = [rows[number] for number in numbers]
        length, kept = max(len(row.ids) for row in some), _kept(some)
        padded = [[*row.ids, *(length - len(row.ids)) * [0]] for row in some]
        ids_BT = torch.tensor(padded, device=model.device)[:, :-1]
        logits_BKV = model(ids_BT, use_cache=False, logits_to_keep=kept).logits
        for number, logits_KV in zip(numbers, logits_BKV, strict=True):
            row = rows[number]
            start = row.context - (length - kept)
            likelihoods[number] = _likelihood(logits_KV[start : start + len(row.answer)], row)
    progress("scoring answers", len(rows), len(rows))
    return [likelihoods[number] for number in range(len(rows))]


def _likelihood(logits_TV: torch.Tensor, row: EncodedItem) -> tuple[float, list[int]]:
    logits_TV = logits_TV.float()
    answer_T = torch.tensor(row.answer, device=logits_TV.device)
    chosen_T = logits_TV.gather(1, answer_T[:, None])[:, 0]
    nll = (logits_TV.logsumexp(dim=1) - chosen_T).double().mean()
    if not nll.isfinite():
        raise ShearlingError(
            f"The negative log-likelihood of an answer is {nll.item()}: the model computes values "
            "that are not numbers; check its weights, or use float32."
        )
    return nll.item(), logits_TV.argmax(dim=1).tolist()


def _written(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[EncodedItem],
    likeliest: Sequence[Sequence[int]],
    batch: int,
    progress: Progress,
) -> list[list[int]]:
    """What the model writes after each prompt, up to and with the end of the line."""
    ends = end_tokens(model, tokenizer)
    written = [_followed(row, tokens) for row, tokens in zip(rows, likeliest, strict=True)]
    open_rows = []
    for number, (row, tokens) in enumerate(zip(rows, written, strict=True)):
        if tokens and tokens[-1] in ends:
            tokens.pop()
        elif not (tuple(tokens) == row.answer or _ended(tokenizer, tokens)):
            open_rows.append(number)

    def length(number: int) -> int:
        return rows[number].context + len(written[number])

    open_rows.sort(key=lambda number: (-length(number), number))
    done = len(rows) - len(open_rows)
    for _, group in groupby(open_rows, key=length):
        progress("writing answers", done, len(rows))
        numbers = list(group)
        _go_on(model, tokenizer, rows, written, numbers, batch)
        done += len(numbers)
    progress("writing answers", len(rows), len(rows))
    return written


def _followed(row: EncodedItem, likeliest: Sequence[int]) -> list[int]:
    """The answer's tokens as long as they are the likeliest, and the first that is another."""
    written: list[int] = []
    for expected, token in zip(row.answer, likeliest, strict=True):
        written.append(token)
        if token != expected:
            break
    return written


def _go_on(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[EncodedItem],
    written: list[list[int]],
    numbers: Sequence[int],
    batch: int,
) -> None:
    """Let the model finish lines of one length so far."""
    starts = [[*rows[n].ids[: rows[n].context], *written[n]] for n in numbers]
    room = [rows[n].most - len(written[n]) for n in numbers]
    added = continue_all(
        model, tokenizer, torch.tensor(starts), Sampling(max(room)), batch=batch,
        finished=lambda tokens: _ended(tokenizer, tokens),
    )  # fmt: skip
    for number, tokens, most in zip(numbers, added, room, strict=True):
        written[number] += tokens[:most]


def _ended(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> bool:
    """Whether tokens hold the end of a line."""
    return END in tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)


def _line(tokenizer: PreTrainedTokenizerBase, row: EncodedItem, tokens: Sequence[int]) -> str:
    """The text of an answer's tokens up to the end of its line, without spaces around it."""
    text = continuation(tokenizer, row.ids[: row.context], tokens)
    return text.partition(END)[0].strip()
