"""Proof that a cut tokenizer still writes every text, and what that costs in tokens."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError
from shearling.model.templates import render_chat
from shearling.pruning.vocabulary.choose import embedding_rows, load_fast_tokenizer

# Scripts, signs and white space that a corpus may lack.
PROBE = (
    "“日本語” 漢字 한국어 العربية עברית हिन्दी ไทย ﬁ İ ß — … 𝔘 🐑 🇨🇭",
    "\U0001f469\U0001f3fd\u200d\U0001f680 \x00\x7f\u200b\ufeff\ufffd",
    "\tdef f(x):\n\n        return  x   # ▁ <0x0A> Ġ\r\n ",
    "".join(map(chr, range(0x20, 0x250))),
)
_CHAT = [
    {"role": "user", "content": "Where do sheep graze?"},
    {"role": "assistant", "content": "On the hill."},
    {"role": "user", "content": "日本語で 🐑?"},
]


def prove_round_trip(source: Path, target: Path, documents: Iterable[str]) -> dict[str, Any]:
    """Compare the texts two tokenizers give back for the same texts, and count their tokens.

    Both are loaded by AutoTokenizer. The target's tokens must be some of the source's, in the order
    of the source's ids, with all added tokens that have a row of the embedding: two ids exchanged
    would show in no text. Every document, a few texts of rare characters and all added tokens are
    encoded and decoded by each, special tokens included. The chat template, if there is one, is
    rendered by each, so ``target`` must hold its copy already.

    Returns:
        ``documents``, ``tokens_before`` and ``tokens_after`` (of the documents, special tokens
        included), ``ratio`` (after / before), and ``chat_template``: whether there is one.

    Raises:
        ShearlingError: a tokenizer cannot be loaded, tokens are missing or out of order, a text
            comes back otherwise, a special token or the chat template is another, or there are no
            documents.
    """
    before, after = load_fast_tokenizer(source), load_fast_tokenizer(target)
    _check_tokens(source, before, target, after)
    chat = _chat(source, before, target, after)
    added = [str(token) for token in after.added_tokens_decoder.values()]
    for text in (*PROBE, " ".join(added), "".join(added), *chat):
        _compare(text, before, after)
    counts = [_compare(document, before, after) for document in documents]
    tokens_before = sum(count for count, _ in counts)
    tokens_after = sum(count for _, count in counts)
    if not tokens_before:
        raise ShearlingError(
            "there is no text to prove the cut tokenizer with; give at least one document."
        )
    return {
        "documents": len(counts),
        "tokens_before": tokens_before,
        "tokens_after": tokens_after,
        "ratio": tokens_after / tokens_before,
        "chat_template": bool(chat),
    }


def _check_tokens(source: Path, before: Any, target: Path, after: Any) -> None:
    if before.special_tokens_map != after.special_tokens_map:
        raise ShearlingError(
            f"the special tokens of {target} are {after.special_tokens_map}, but those of {source} "
            f"are {before.special_tokens_map}; let rewrite_tokenizer write its files."
        )
    rows, old = embedding_rows(source), before.get_vocab()
    new = after.get_vocab()
    gone = [name for name, i in before.added_tokens_encoder.items() if i < rows and name not in new]
    if gone:
        raise ShearlingError(
            f"the tokenizer in {target} lacks {gone[0]!r}, an added token of {source}; "
            "keep all added tokens, as choose_tokens does."
        )
    numbers = [old.get(token, -1) for token in sorted(new, key=new.__getitem__)]
    for number, (one, other) in enumerate(pairwise([-1, *numbers])):
        if one >= other:
            raise ShearlingError(
                f"token {number} of {target} is {after.convert_ids_to_tokens(number)!r}, which "
                f"does not follow the order of {source}; let rewrite_tokenizer write its files."
            )


def _compare(text: str, before: Any, after: Any) -> tuple[int, int]:
    """Numbers of tokens of a text that both give back alike."""
    encoded = [t(text, verbose=False)["input_ids"] for t in (before, after)]
    expected, actual = (
        t.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for t, ids in zip((before, after), encoded, strict=True)
    )
    if expected != actual:
        pairs = enumerate(zip(expected, actual, strict=False))
        shorter = min(len(expected), len(actual))
        place = next((i for i, (one, other) in pairs if one != other), shorter)
        here = slice(max(0, place - 20), place + 20)
        raise ShearlingError(
            f"the cut tokenizer gives {actual[here]!r} where its source gives {expected[here]!r}, "
            f"in the text that begins {text[:40]!r}; keep more tokens, and please report this."
        )
    return len(encoded[0]), len(encoded[1])


def _chat(source: Path, before: Any, target: Path, after: Any) -> list[str]:
    """The rendered conversation, or nothing if there is no chat template."""
    expected, actual = _render(before), _render(after)
    if expected != actual:
        raise ShearlingError(
            f"the chat template of {target} renders {actual!r}, but that of {source} "
            f"{expected!r}; copy chat_template.jinja, or tokenizer_config.json's, unchanged."
        )
    return [] if expected is None else [expected]


def _render(tokenizer: Any) -> str | None:
    if not tokenizer.chat_template:
        return None
    try:
        return render_chat(tokenizer, _CHAT, ask=True)
    except Exception as error:  # templates raise what they like; both must raise the same
        return f"{type(error).__name__}: {error}"
