"""Which tokens stay: a corpus is counted, and what it misses least goes first."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from shearling.data.text import pieces
from shearling.errors import ShearlingError
from shearling.files.reading import read_json
from shearling.model.loading import load_tokenizer
from shearling.model.token_ids import Move, named_ids
from shearling.pruning.vocabulary.pieces import (
    Parts,
    indispensable,
    model_kind,
    model_tokens,
    read_tokenizer,
    spelling,
)

BATCH = 64  # documents tokenised at a time
PIECE_CHARACTERS = 100_000  # of a longer document; more at a time costs memory and gains nothing


def choose_tokens(
    directory: Path, documents: Iterable[str], size: int | None = None
) -> tuple[int, ...]:
    """Source ids of the tokens to keep, ascending.

    The tokens of ``documents`` are counted with the source's tokenizer. Then one token after
    another goes, that whose going lengthens the corpus least; its count passes to the tokens its
    text is spelt with from then on. A BPE token goes only after all that are merged from it, so
    what is kept holds the ingredients of every kept token, down to single characters or bytes.
    Among equals the highest id goes first: in BPE, the rarest in the text it was trained on.

    Special and added tokens, ids that config.json and generation_config.json name, byte tokens
    and the unknown token always stay, and so do single characters where bytes cannot stand for
    them. Rows of the embedding that no token uses go, unless a configuration names them; tokens
    that have no row, which the model cannot have been given, go too.

    Args:
        directory: a model directory with tokenizer.json; nothing in it is changed.
        documents: text like that which the cut model is for.
        size: how many to keep, exactly; tokens the corpus does not use fill it up if need be.
            None keeps all the corpus uses, and what must stay.

    Raises:
        ShearlingError: no tokenizer that can be cut, a damaged file, no text, or a ``size`` below
            what must stay or above what there is.
    """
    words = SpelledVocabulary.of(directory)
    everything, fixed = words.everything, words.fixed
    if size is not None and not len(fixed) <= size <= len(everything):
        raise ShearlingError(
            f"a vocabulary of {size:,} tokens was asked for, but {directory} has "
            f"{len(everything):,}, of which {len(fixed):,} must stay (special tokens, bytes, "
            f"characters); ask for {len(fixed):,} to {len(everything):,}."
        )
    kept = set(everything)
    for token, cost in words.removals(words.counted(documents)):
        if len(kept) <= size if size is not None else cost:
            break
        kept.remove(token)
    return tuple(sorted(kept))


@dataclass(frozen=True)
class SpelledVocabulary:
    """A tokenizer's tokens: which must stay, and what each is spelt with without it.

    Attributes:
        tokenizer: as users load it.
        everything: ids of the tokens that have a row of the embedding.
        fixed: those that must stay.
        parts: what a token is spelt with when it alone is gone.
        needs: what must stay as long as a token does.
    """

    tokenizer: Any
    everything: frozenset[int]
    fixed: frozenset[int]
    parts: Parts
    needs: Parts

    @staticmethod
    def of(directory: Path) -> SpelledVocabulary:
        """Those of a model directory (ShearlingError for a tokenizer that cannot be cut)."""
        raw = read_tokenizer(directory)
        tokenizer = load_fast_tokenizer(directory)
        rows = embedding_rows(directory)
        tokens = {i for i in model_tokens(raw["model"]).values() if i < rows}
        fixed = {i for i in _named(directory, raw, tokenizer) if i < rows}
        fixed |= indispensable(raw) & tokens
        parts = spelling(raw["model"])
        needs = parts if model_kind(raw["model"]) == "BPE" else _nothing
        fixed = _closed(fixed, needs)
        return SpelledVocabulary(
            tokenizer, frozenset(tokens | fixed), frozenset(fixed), parts, needs
        )

    def counted(self, documents: Iterable[str]) -> Counter[int]:
        """How often each token occurs in the documents (ShearlingError if there is no text)."""
        counts = _count(self.tokenizer, documents)
        if not counts:
            raise ShearlingError(
                "the text to choose tokens by is empty; give documents like those the model is for."
            )
        return counts

    def used(self, counts: Mapping[int, int]) -> set[int]:
        """What is left once all went that a text does not use, nor any token that it does."""
        occurring = {token for token, count in counts.items() if count} & self.everything
        return _closed(set(self.fixed) | occurring, self.needs)

    def removals(self, counts: Mapping[int, int]) -> Iterator[tuple[int, int]]:
        """Tokens in the order in which they go, each with the tokens by which the corpus grows.

        Always the cheapest that no token needs which is still there.
        """
        kept, left = set(self.everything), Counter(counts)
        needed = Counter(part for token in kept for part in self.needs(token))

        def cost(token: int) -> int:
            """Tokens by which the corpus grows without this one; 0 only if it is not used."""
            return left[token] and left[token] * max(1, len(self.parts(token)) - 1)

        heap = [(cost(token), -token) for token in kept - self.fixed if not needed[token]]
        heapq.heapify(heap)
        while heap:
            noted, token = heap[0][0], -heap[0][1]
            if noted != cost(token):  # it has taken over counts since
                heapq.heapreplace(heap, (cost(token), -token))
                continue
            yield token, noted
            heapq.heappop(heap)
            kept.remove(token)
            _pass_on(token, kept, left, self.parts)
            for part in self.needs(token):
                needed[part] -= 1
                if not needed[part] and part not in self.fixed:
                    heapq.heappush(heap, (cost(part), -part))


def load_fast_tokenizer(directory: Path) -> Any:
    """The tokenizer as users load it: for some models transformers departs from tokenizer.json.

    Raises:
        ShearlingError: transformers cannot read it, or not with the tokenizers library.
    """
    tokenizer: Any = load_tokenizer(directory)
    if not getattr(tokenizer, "is_fast", False):
        raise ShearlingError(
            f"the tokenizer in {directory} loads as {type(tokenizer).__name__}, but only those "
            "that the tokenizers library runs can be cut; keep the whole vocabulary."
        )
    return tokenizer


def visit_tokenizer(raw: dict[str, Any], move: Move) -> dict[str, Any]:
    """tokenizer.json with ``move`` applied to the ids outside its model and added tokens."""
    moved = dict(raw)
    if raw.get("post_processor"):
        moved["post_processor"] = _visit_processor(raw["post_processor"], move)
    if raw.get("padding"):
        moved["padding"] = raw["padding"] | {"pad_id": move(raw["padding"]["pad_id"])}
    return moved


def _visit_processor(processor: dict[str, Any], move: Move) -> dict[str, Any]:
    moved = dict(processor)
    if "processors" in processor:
        moved["processors"] = [_visit_processor(one, move) for one in processor["processors"]]
    if processor["type"] == "TemplateProcessing":
        moved["special_tokens"] = {
            name: token | {"ids": [move(old) for old in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
    for name in ("sep", "cls"):  # of BertProcessing and RobertaProcessing
        if name in processor:
            moved[name] = [processor[name][0], move(processor[name][1])]
    return moved


def embedding_rows(directory: Path) -> float:
    """Rows of the embedding; without config.json there is no bound."""
    file = directory / "config.json"
    config = read_json(file) if file.is_file() else {}
    return config.get("vocab_size", config.get("text_config", {}).get("vocab_size", float("inf")))


def _named(directory: Path, raw: dict[str, Any], tokenizer: Any) -> set[int]:
    """Ids that some file names: special and added tokens, and those of the configurations."""
    ids = {added["id"] for added in raw.get("added_tokens") or []}
    ids |= set(tokenizer.added_tokens_decoder)  # special tokens that tokenizer.json lacks
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            config = read_json(directory / name)
            ids |= named_ids(config)
            ids |= {int(old) for old in config.get("added_tokens_decoder", {})}
    if (directory / "added_tokens.json").is_file():
        ids |= set(read_json(directory / "added_tokens.json").values())

    def note(old: int) -> int:
        ids.add(old)
        return old

    visit_tokenizer(raw, note)
    return ids


def _nothing(_: int) -> tuple[int, ...]:
    """A Unigram piece needs no other: each is scored by itself."""
    return ()


def _closed(ids: set[int], needs: Parts) -> set[int]:
    """``ids`` and all they are merged from."""
    closed, left = set(ids), list(ids)
    while left:
        new = [part for part in needs(left.pop()) if part not in closed]
        closed.update(new)
        left.extend(new)
    return closed


def _count(tokenizer: Any, documents: Iterable[str]) -> Counter[int]:
    """How often each token occurs in the documents, no special tokens added."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    counts: Counter[int] = Counter()
    parts = (part for document in documents for part in pieces(document, PIECE_CHARACTERS))
    while batch := list(islice(parts, BATCH)):
        for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
            counts.update(encoding.ids)
    return counts


def _pass_on(token: int, kept: set[int], counts: Counter[int], parts: Parts) -> None:
    """Add a dropped token's count to the kept tokens that its text is now spelt with."""
    if not counts[token]:
        return
    left = list(parts(token))
    while left:
        part = left.pop()
        if part in kept:
            counts[part] += counts[token]
        else:
            left.extend(parts(part))
