"""What a smaller vocabulary costs: how often the words that go occur in a text.

A token is *cheap* if less than a millionth more tokens are needed for the text once it is gone:
it never occurs, or next to never. Byte, special and named tokens stay whatever is asked
(:mod:`shearling.pruning.vocabulary.choose`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.plan import Spending
from shearling.pruning.vocabulary.choose import SpelledVocabulary
from shearling.table.values import Shape

CHEAP = 1e-6  # of the text's tokens, by which it grows without a token
HINT_CHARACTERS = 20_000_000  # of a text are read for a hint, which may take seconds, not minutes
LARGE = 0.3  # of all parameters: from here on words are worth a look
Documents = Callable[[], Iterable[str]]  # gives a text when it is needed


@dataclass(frozen=True)
class VocabularyPrice:
    """What the tokens of a vocabulary are worth to a text.

    Attributes:
        tokens: of the vocabulary that have a row.
        occurrences: tokens of the text.
        lost: occurrences of the first tokens to go, of the first two, and so on; all that are
            cheap, in the order in which they go.
        unseen: the share of the tokens of more such text that this one lacks, as expected.
    """

    tokens: int
    occurrences: int
    lost: tuple[int, ...]
    unseen: float = 0.0

    @staticmethod
    def of(directory: Path, documents: Documents) -> VocabularyPrice:
        """Price the vocabulary of a model directory; ``documents`` gives the text.

        Raises:
            ShearlingError: as :func:`shearling.pruning.vocabulary.choose.choose_tokens`.
        """
        words = SpelledVocabulary.of(directory)
        counts = words.counted(documents())
        occurrences, gone, lost = sum(counts.values()), 0, []
        for token, cost in words.removals(counts):
            if cost >= CHEAP * occurrences:
                break
            gone += counts[token]
            lost.append(gone)
        return VocabularyPrice(len(words.everything), occurrences, tuple(lost), unseen(counts))

    @property
    def fewest(self) -> int:
        """Tokens that are left once all cheap ones went."""
        return self.tokens - len(self.lost)

    @cached_property
    def unused(self) -> int:
        """How many can go of which the text has none."""
        return bisect_left(self.lost, 1)

    def share_lost(self, size: int) -> float:
        """The share of the text's tokens that a vocabulary of ``size`` spells in pieces."""
        gone = self.tokens - size
        return self.lost[gone - 1] / self.occurrences if gone > 0 else 0.0

    def as_json(self, size: int) -> dict[str, Any]:
        """For the manifest."""
        return {
            "tokens": self.tokens, "kept": size, "occurrences": self.occurrences,
            "unused": self.unused, "share_spelled_in_pieces": self.share_lost(size),
            "share_unseen": self.unseen,
        }  # fmt: skip


def unseen(counts: Mapping[int, int]) -> float:
    """The share of further text that is tokens which the text so far has not.

    As many as occur once, over all (Good and Turing; Good 1953, Biometrika 40).
    """
    return sum(count == 1 for count in counts.values()) / sum(counts.values())


def vocabulary_share(source: Checkpoint) -> float:
    """The share of all parameters that rows of words have, an untied head's among them."""
    layout, shape = source.layout, source.shape
    counted = sum(
        layout.numbers(row, shape)
        for row in layout.stored
        if any("vocab" in dim.axes for dim in row.dims)
    )
    return counted / layout.count(shape)


def words_first(source: Checkpoint, price: VocabularyPrice, fits: Callable[[Shape], bool]) -> Shape:
    """The source's shape without as many cheap words as it takes to fit, or without all of them.

    Args:
        source: the model.
        price: of its vocabulary.
        fits: whether a shape is small enough; of two that differ in words the smaller is, if the
            larger is.
    """
    low, high = price.fewest, price.tokens
    while low < high:  # the most words that fit
        middle = (low + high + 1) // 2
        if fits(source.shape.with_(vocab=middle)):
            low = middle
        else:
            high = middle - 1
    return source.shape.with_(vocab=low)


@lru_cache(maxsize=1)
def _priced(directory: Path, documents: Documents) -> VocabularyPrice:
    """The price, found once for several sizes that are asked for together."""
    return VocabularyPrice.of(directory, documents)


def begin_with_words(
    source: Checkpoint,
    spending: Spending,
    documents: Documents | None,
    fits: Callable[[Shape], bool],
) -> tuple[Shape, dict[str, Any]]:
    """The shape that a budget begins with, and what the manifest says of its words.

    Raises:
        ShearlingError: words are to go, and there is no text to choose them by.
    """
    if spending.axes is None or "vocab" not in spending.axes:
        return source.shape, {}
    if documents is None:
        raise ShearlingError(
            "--axes vocab takes words that a text does not need; give --calibration FILE, or "
            "leave vocab out."
        )
    price = _priced(source.path, documents)
    start = words_first(source, price, fits)
    return start, price.as_json(start["vocab"])


def hint(source: Checkpoint, documents: Documents | None) -> str | None:
    """A sentence for the user on words that a budget leaves alone; None where they are few."""
    share = vocabulary_share(source)
    if share <= LARGE or not (source.path / "tokenizer.json").is_file():
        return None
    head = f"the vocabulary is {share:.0%} of the {source.parameters:,} parameters"
    axes = "--axes layers,mlp,vocab"
    if documents is None:
        return f"{head}; {axes} takes words that --calibration FILE does not need before all else."
    try:
        everything, used, counts = _used(source.path, documents)
    except ShearlingError:  # a tokenizer that cannot be cut: nothing to take
        return None
    gone = 1 - source.layout.count(source.shape.with_(vocab=used)) / source.parameters
    return (
        f"{head}, and {everything - used:,} of its {everything:,} words are "
        f"in no token of the calibration text ({sum(counts.values()):,}): without them {gone:.0%} "
        "of the parameters go, and of more text like it at most about "
        f"{unseen(counts):.1%} of the tokens are spelled in pieces. {axes} takes such words first; "
        "give text of all that the model is for."
    )


@lru_cache(maxsize=1)
def _used(directory: Path, documents: Documents) -> tuple[int, int, Mapping[int, int]]:
    """How many words there are, how many the beginning of a text uses, and how often."""
    words = SpelledVocabulary.of(directory)
    counts = words.counted(_beginning(documents(), HINT_CHARACTERS))
    return len(words.everything), len(words.used(counts)), counts


def _beginning(documents: Iterable[str], characters: int) -> Iterator[str]:
    """The first documents, one at least, until so many characters were read."""
    read = 0
    for document in documents:
        yield document
        read += len(document)
        if read >= characters:
            return
