"""The tokenizer that a GGUF file's metadata describe, as tokenizer.json and its configuration.

A file lists tokens, their kinds and what makes them up: merges of a byte-level vocabulary, or
scores of a sentencepiece one, from which merges follow. All of it is handed to the ``tokenizers``
library at once; hundreds of thousands of tokens take seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError, shortened
from shearling.files.writer import write_json, write_text
from shearling.model.gguf.header import GgufFile
from shearling.model.gguf.sentencepiece import sentencepiece_model

_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "▁"
_GEMMA = "gemma"  # architectures whose name begins so share a tokenizer
_NAMED = {
    "bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id", "mask_token": "mask_token_id",
}  # fmt: skip
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{{0}}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{{0}}"
)
_CASED_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _SHORT + _WORDS + r"|\p{N}{1,3}" + _TAIL
_QWEN2 = _SHORT + _WORDS + r"|\p{N}" + _TAIL
_TEKKEN = _CASED.replace("{0}", "") + r"|\p{N}" + _CASED_TAIL
_GPT4O = _CASED.replace("{0}", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?") + r"|\p{N}{1,3}" + _CASED_TAIL
# How a byte-level vocabulary's text was cut before its merges were learned; GPT-2's way otherwise.
# The names are llama.cpp's, from its converter's ``get_vocab_base_pre``.
_SPLITS = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "megrez"), _QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
    "tekken": _TEKKEN,
}  # fmt: skip


@dataclass(frozen=True)
class _Vocabulary:
    """What the metadata say of tokens."""

    kind: str
    cut: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str] | None
    named: Mapping[str, str]
    add: Mapping[str, bool | None]


def write_tokenizer(file: GgufFile, directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template, if there is one.

    Raises:
        ShearlingError: a kind of tokenizer that is not known, or lists that contradict each other.
    """
    words = _vocabulary(file)
    if words.kind == "gpt2":
        raw = _byte_level(file, words)
    elif file.architecture.startswith(_GEMMA):
        raw = _gemma(file, words)
    else:
        raw = _sentencepiece(file, words)
    _add_tokens(raw, words)
    _add_ends(raw, words)
    write_text(directory / "tokenizer.json", raw.to_str(pretty=True))
    settings: dict[str, Any] = {
        "backend": "tokenizers", "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False, **words.named,
        "model_max_length": 10**30,
    }  # fmt: skip
    if file.architecture.startswith(_GEMMA):  # as its own tokenizer pads
        settings["padding_side"] = "left"
    if words.kind == "llama":
        settings["added_tokens_decoder"] = _write_pieces(file, words, directory)
    write_json(directory / "tokenizer_config.json", settings)
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        write_text(directory / "chat_template.jinja", template)


def _vocabulary(file: GgufFile) -> _Vocabulary:
    def listed(key: str, kind: type) -> list[Any]:
        value = file.metadata.get(f"tokenizer.ggml.{key}", [])
        if not isinstance(value, list) or not all(type(one) is kind for one in value):
            raise _wrong(file, f"tokenizer.ggml.{key} is no list of {kind.__name__}")
        return value

    model = str(file.metadata.get("tokenizer.ggml.model"))
    if model not in ("gpt2", "llama"):
        raise _wrong(file, f"its tokenizer is of the kind {model!r}, and gpt2 and llama are known")
    tokens, types, scores = (
        listed("tokens", str),
        listed("token_type", int),
        listed("scores", float),
    )
    merges = listed("merges", str) if "tokenizer.ggml.merges" in file.metadata else None
    if not tokens or len(types) not in (0, len(tokens)) or len(set(tokens)) != len(tokens):
        raise _wrong(file, f"{len(types)} kinds for {len(tokens)} tokens, of which some are alike")
    if merges is None and (model == "gpt2" or len(scores) != len(tokens)):
        raise _wrong(file, "neither merges nor scores say how its tokens are made up")
    named = {}
    for name, key in _NAMED.items():
        number = file.metadata.get(f"tokenizer.ggml.{key}")
        number = number[0] if isinstance(number, list) and number else number
        if number is None:
            continue
        if not isinstance(number, int) or not 0 <= number < len(tokens):
            raise _wrong(file, f"{key} is {number!r}, and it has {len(tokens)} tokens")
        named[name] = tokens[number]
    flags = {
        key: file.metadata.get(f"tokenizer.ggml.{key}")
        for key in ("add_bos_token", "add_eos_token", "add_space_prefix")
    }
    cut = str(file.metadata.get("tokenizer.ggml.pre"))
    return _Vocabulary(model, cut, tokens, types, scores, merges, named, flags)


def _byte_level(file: GgufFile, words: _Vocabulary) -> Any:
    from tokenizers import Regex, decoders, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    spelling = bytes_to_unicode()
    alphabet = set(spelling.values())
    vocab = {
        token
        if set(token) <= alphabet
        else "".join(spelling[byte] for byte in token.encode("utf-8")): number
        for number, token in enumerate(words.tokens)
    }
    raw = _bpe(file, vocab, _given(words.merges or []), fuse_unk=False)
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if words.cut in _SPLITS:
        raw.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(_SPLITS[words.cut]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
    raw.decoder = decoders.ByteLevel()
    return raw


def _gemma(file: GgufFile, words: _Vocabulary) -> Any:
    """Spaces are letters; merges follow the order of the tokens, not the scores."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    vocab = {token: number for number, token in enumerate(_spelled(words.tokens))}
    merges = _given(words.merges) if words.merges is not None else implied_merges(vocab)
    raw = _bpe(
        file, vocab, merges, fuse_unk=True, byte_fallback=True,
        unk_token=words.named.get("unk_token"),
    )  # fmt: skip
    raw.normalizer = normalizers.Replace(" ", _SPACE)
    raw.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous")
    raw.decoder = decoders.Sequence([
        decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()
    ])  # fmt: skip
    return raw


def _sentencepiece(file: GgufFile, words: _Vocabulary) -> Any:
    from tokenizers import decoders, normalizers, pre_tokenizers

    vocab = {token: number for number, token in enumerate(words.tokens)}
    scores = words.scores if len(words.scores) == len(words.tokens) else None
    merges = _given(words.merges) if words.merges is not None else implied_merges(vocab, scores)
    raw = _bpe(file, vocab, merges, fuse_unk=True, byte_fallback=True)
    prefix = words.add["add_space_prefix"] is not False
    if file.architecture == "phi3":  # a space before whatever the text begins with
        raw.normalizer = normalizers.Sequence(
            [normalizers.Prepend(_SPACE)] * prefix + [normalizers.Replace(" ", _SPACE)]
        )
    else:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=_SPACE, prepend_scheme="first" if prefix else "never", split=False
        )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    raw.decoder = decoders.Sequence([*steps, *[decoders.Strip(content=" ", left=1)] * prefix])
    return raw


def _write_pieces(file: GgufFile, words: _Vocabulary, directory: Path) -> dict[str, Any]:
    """Write tokenizer.model, if sentencepiece could load it; its tokens of the user's, by id."""
    pieces = _spelled(words.tokens)
    gemma = file.architecture.startswith(_GEMMA)
    prefix = words.add["add_space_prefix"] is not False and not gemma
    model = sentencepiece_model(pieces, words.scores, words.types, prefix=prefix)
    if model is None:
        return {}
    (directory / "tokenizer.model").write_bytes(model)
    return {
        str(number): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False,
            "single_word": False, "special": False,
        }
        for number, (token, kind) in enumerate(zip(pieces, words.types, strict=True))
        if kind == _USER_DEFINED
    }  # fmt: skip


def _spelled(tokens: Sequence[str]) -> list[str]:
    """Tokens of spaces alone as sentencepiece spells them; a file has real spaces there."""
    return [
        _SPACE * len(token) if " " in token and not token.strip() else token for token in tokens
    ]


def _given(merges: Sequence[str]) -> list[tuple[str, str]]:
    return [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]


def implied_merges(
    vocab: Mapping[str, int], scores: Sequence[float] | None = None
) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, best first.

    Args:
        vocab: token -> number, in order.
        scores: the higher, the sooner a token is made; by default the first tokens first.

    Returns:
        Pairs; of one score, longer left parts first, then longer right ones, then lower numbers.
    """
    entries = []
    for token, number in vocab.items():
        parts = [
            (token[:middle], token[middle:])
            for middle in range(1, len(token))
            if token[:middle] in vocab and token[middle:] in vocab
        ]
        parts.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        score = -number if scores is None else scores[number]
        entries += [(score, len(left), len(right), left, right) for left, right in parts]
    entries.sort(key=lambda entry: entry[:3], reverse=True)  # alike ones stay in order
    return [(left, right) for *_, left, right in entries]


def _bpe(file: GgufFile, vocab: dict[str, int], merges: list[tuple[str, str]], **how: Any) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    try:
        return Tokenizer(BPE(vocab=vocab, merges=merges, **how))
    except Exception as error:  # the library raises bare exceptions
        raise _wrong(file, f"its merges and tokens contradict each other: {error}") from error


def _add_tokens(raw: Any, words: _Vocabulary) -> None:
    """Tokens that are never cut: control tokens, named ones and those that the user defined."""
    from tokenizers import AddedToken
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    # Each real token of a byte-level vocabulary is spelled in bytes; a control token that is not
    # was marked so by mistake, and adding it would make the vocabulary larger than the model.
    spelled = set(bytes_to_unicode().values()) if words.kind == "gpt2" else None
    named = set(words.named.values())
    special, plain = [], []
    for token, kind in zip(words.tokens, words.types or [1] * len(words.tokens), strict=True):
        if token in named or kind == _CONTROL:
            if spelled is None or set(token) <= spelled:
                special.append(AddedToken(token, normalized=False, special=True))
        elif kind == _USER_DEFINED and raw.token_to_id(token) is not None:
            plain.append(AddedToken(token, normalized=False, special=False))
    raw.add_special_tokens(special)
    raw.add_tokens(plain)


def _add_ends(raw: Any, words: _Vocabulary) -> None:
    """What stands before and behind every text; a sentencepiece vocabulary begins with BOS."""
    from tokenizers import processors

    add = dict(words.add)
    if words.kind == "llama" and add["add_bos_token"] is None:
        add["add_bos_token"] = True
    bos, eos = (
        words.named.get(f"{name}_token") if add[f"add_{name}_token"] else None
        for name in ("bos", "eos")
    )
    ends = [(token, raw.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token]
    if not ends:
        return
    raw.post_processor = processors.TemplateProcessing(
        single=_template(bos, eos, "A", 0),
        pair=_template(bos, eos, "A", 0) + _template(bos, eos, "B", 1),
        special_tokens=ends,
    )


def _template(bos: str | None, eos: str | None, name: str, kind: int) -> list[str]:
    return [f"{bos}:{kind}"] * bool(bos) + [f"${name}:{kind}"] + [f"{eos}:{kind}"] * bool(eos)


def _wrong(file: GgufFile, what: str) -> ShearlingError:
    return ShearlingError(
        f"{file.path} holds no tokenizer that can be read ({shortened(what)}); give the model's "
        "safetensors, with its tokenizer, instead."
    )
