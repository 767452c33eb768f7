"""What a tokenizer's model is made of: its tokens, and what each is spelt with in its absence."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError, told
from shearling.files.reading import read_json

TOKENIZER = "tokenizer.json"
Parts = Callable[[int], tuple[int, ...]]

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_UNKNOWN_PENALTY = 10.0  # what tokenizers takes off the lowest score for an unknown character


def read_tokenizer(directory: Path) -> dict[str, Any]:
    """The tokenizer.json of a model directory, if it is of a kind that can be cut.

    Raises:
        ShearlingError: it is absent, broken, or neither BPE nor Unigram, or its BPE marks the
            beginnings or ends of words.
    """
    file = directory / TOKENIZER
    if not file.is_file():
        raise ShearlingError(
            f"{directory} has no {TOKENIZER}, which cutting the vocabulary needs; load its "
            "tokenizer with transformers and save it, or keep the whole vocabulary."
        )
    raw = read_json(file)
    model = raw.get("model")
    kind = model_kind(model) if isinstance(model, dict) else None
    if kind not in ("BPE", "Unigram"):
        raise ShearlingError(
            f"{file} holds a {kind or 'damaged'} model, but only the vocabulary of BPE and Unigram "
            "tokenizers can be cut; keep the whole vocabulary."
        )
    for mark in ("continuing_subword_prefix", "end_of_word_suffix"):
        if kind == "BPE" and raw["model"].get(mark):
            raise ShearlingError(
                f"{file} sets {mark} to {told(raw['model'][mark])}, but only BPE without such "
                "marks can be cut; keep the whole vocabulary."
            )
    return raw


def model_kind(model: dict[str, Any]) -> str | None:
    """``BPE``, ``Unigram``, or another; files from before the type was written have none."""
    if "type" in model:
        return model["type"]
    if "merges" in model:
        return "BPE"
    return "Unigram" if isinstance(model.get("vocab"), list) else None


def model_tokens(model: dict[str, Any]) -> dict[str, int]:
    """Token -> id, added tokens that the model does not know left out."""
    if model_kind(model) == "Unigram":
        return {piece: i for i, (piece, _) in enumerate(model["vocab"])}
    return model["vocab"]


def merge_pair(merge: str | list[str]) -> tuple[str, str]:
    """Both sides of a merge, written as ``"a b"`` or as ``["a", "b"]``."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def indispensable(raw: dict[str, Any]) -> set[int]:
    """Ids of the model's tokens without which some text could not be written any more.

    Byte tokens, the unknown token, what the tokenizer puts in place of white space, and, unless
    bytes can stand for every character, all single characters.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    model = raw["model"]
    tokens = model_tokens(model)
    around = [
        leaf for name in ("normalizer", "pre_tokenizer", "decoder") for leaf in _leaves(raw[name])
    ]
    byte_level = ("type", "ByteLevel") in around
    needed = {i for token, i in tokens.items() if _BYTE.fullmatch(token)}
    complete = byte_level or bool(model.get("byte_fallback") and len(needed) == 256)
    if byte_level:
        needed |= {tokens[symbol] for symbol in ByteLevel.alphabet() if symbol in tokens}
    if not complete:
        needed |= {i for token, i in tokens.items() if len(token) == 1}
    # Decoders turn "▁" back into a space before they join bytes, so bytes cannot stand for it.
    inserted = {"▁"}.union(*(value for key, value in around if key != "type"))
    needed |= {tokens[character] for character in inserted if character in tokens}
    if model.get("unk_token") in tokens:
        needed.add(tokens[model["unk_token"]])
    if model.get("unk_id") is not None:
        needed.add(model["unk_id"])
    return needed


def spelling(model: dict[str, Any]) -> Parts:
    """Id -> ids of what its text is spelt with when that token alone is gone, computed once each.

    For a BPE token these are both sides of the merge that makes it, where it is made by one.
    """
    find = _unigram_parts(model) if model_kind(model) == "Unigram" else _bpe_parts(model)
    texts = {i: token for token, i in model_tokens(model).items()}
    return cache(lambda token: find(texts[token]) if token in texts else ())


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, value) of every string in a JSON value."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _leaves(value, name)
    elif isinstance(node, list):
        for value in node:
            yield from _leaves(value, key)
    elif isinstance(node, str) and key != "precompiled_charsmap":
        yield key, node


def _character(character: str, tokens: dict[str, int], *, whole: bool) -> list[str]:
    """Tokens for one character: its own, if ``whole`` and there is one, or its bytes'."""
    if whole and character in tokens:
        return [character]
    spelt = [f"<0x{byte:02X}>" for byte in character.encode("utf-8", "replace")]
    return spelt if all(byte in tokens for byte in spelt) else []


def _bpe_parts(model: dict[str, Any]) -> Callable[[str], tuple[int, ...]]:
    """Sides of the last merge that makes a token.

    GPT-2's files hold one merge a token. Those converted from sentencepiece or tiktoken hold every
    split of it into two tokens, of which merging in order takes one, whatever stands around the
    token: a merge across its border would have prevented it.
    """
    tokens: dict[str, int] = model["vocab"]
    pairs = [merge_pair(merge) for merge in model["merges"]]
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    made_by: dict[str, list[tuple[str, str]]] = {}
    for pair in ranks:
        made_by.setdefault("".join(pair), []).append(pair)

    def parts(text: str) -> tuple[int, ...]:
        ways = made_by.get(text, [])
        if len(ways) == 1:
            return tokens[ways[0][0]], tokens[ways[0][1]]
        whole = len(text) > 1
        symbols = [
            symbol for character in text for symbol in _character(character, tokens, whole=whole)
        ]
        return tuple(tokens[symbol] for symbol in _merge(symbols, ranks, stop=text))

    return parts


def _merge(symbols: list[str], ranks: dict[tuple[str, str], int], stop: str) -> list[str]:
    """Apply merges in order of rank, leftmost first, up to the one that would make ``stop``."""
    while True:
        candidates = [
            (rank, place)
            for place in range(len(symbols) - 1)
            if (rank := ranks.get((symbols[place], symbols[place + 1]))) is not None
        ]
        if not candidates:
            return symbols
        place = min(candidates)[1]
        merged = symbols[place] + symbols[place + 1]
        if merged == stop:
            return symbols
        symbols = [*symbols[:place], merged, *symbols[place + 2 :]]


def _unigram_parts(model: dict[str, Any]) -> Callable[[str], tuple[int, ...]]:
    """The best spelling (Viterbi) of a piece's text without that piece."""
    tokens = model_tokens(model)
    scores: dict[str, float] = dict(model["vocab"])
    unknown = min(scores.values(), default=0.0) - _UNKNOWN_PENALTY

    def parts(text: str) -> tuple[int, ...]:
        best: list[tuple[float, list[str]]] = [(0.0, [])]
        for end in range(1, len(text) + 1):
            score, path = best[end - 1]
            last = _character(text[end - 1], tokens, whole=False)
            ways = [(score + unknown, [*path, *last])]
            for start in range(end):
                piece = text[start:end]
                if piece in scores and piece != text:
                    ways.append((best[start][0] + scores[piece], [*best[start][1], piece]))
            best.append(max(ways))
        return tuple(tokens[piece] for piece in best[-1][1])

    return parts
