"""The tokenizer's files, with other ids and fewer tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError
from shearling.files.reading import read_json
from shearling.files.writer import write_json, write_text
from shearling.model.token_ids import Move, renumber_ids
from shearling.pruning.vocabulary.choose import visit_tokenizer
from shearling.pruning.vocabulary.pieces import (
    TOKENIZER,
    indispensable,
    merge_pair,
    model_kind,
    model_tokens,
    read_tokenizer,
)

# What rewrite_tokenizer writes where the source has it.
REWRITTEN = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def rewrite_tokenizer(source: Path, kept: tuple[int, ...], target: Path) -> None:
    """Write into ``target`` the source's tokenizer with the tokens ``kept`` alone.

    The new id of a token is its position in ``kept``. Of the merges those stay whose two sides and
    result do, in their order. Ids of added tokens, post-processors and padding are renumbered, and
    so are tokenizer_config.json, added_tokens.json, vocab.json and merges.txt where the source has
    them; all that is not about ids stays as it is. A binary sentencepiece model (tokenizer.model)
    or another form of the whole vocabulary (``TOKENIZER`` in :mod:`shearling.model.side_files`)
    has no place in the result and is left out: tokenizer.json replaces it.

    An added token that is not kept is no longer one: its text is tokenised like any other.

    Args:
        source: a model directory; nothing in it is changed.
        kept: source ids, ascending, as ``choose_tokens`` gives them.
        target: an existing directory; files of these names in it are replaced.

    Raises:
        ShearlingError: the tokenizer cannot be cut, ``kept`` is not in order or lacks what must
            stay, ``target`` is the source, or what was written does not number its tokens so.
    """
    raw = read_tokenizer(source)
    if target.resolve() == source.resolve():
        raise ShearlingError(
            f"the cut tokenizer was to be written into its source {source}, which is never "
            "written to; name another directory."
        )
    position = {old: new for new, old in enumerate(kept)}
    if not kept or list(position) != sorted(kept) or kept[0] < 0 or len(position) != len(kept):
        raise ShearlingError(
            "the token ids to keep must be distinct, ascending and not negative; "
            "give them as choose_tokens does."
        )

    def move(old: int) -> int:
        if old not in position:
            raise ShearlingError(
                f"token id {old} is not among the {len(kept)} kept, but the tokenizer in {source} "
                "cannot do without it; keep it, as choose_tokens does."
            )
        return position[old]

    for old in sorted(indispensable(raw)):
        move(old)
    write_json(target / TOKENIZER, _tokenizer(raw, position, move))
    _side_files(source, kept, position, model_tokens(raw["model"]), target)
    _check_numbers(source, kept, target)


def _tokenizer(raw: dict[str, Any], position: dict[int, int], move: Move) -> dict[str, Any]:
    added = [
        token | {"id": position[token["id"]]}
        for token in raw.get("added_tokens") or []
        if token["id"] in position
    ]
    model = raw["model"]
    if model_kind(model) == "Unigram":
        cut = {"vocab": [entry for i, entry in enumerate(model["vocab"]) if i in position]}
        if model.get("unk_id") is not None:
            cut["unk_id"] = move(model["unk_id"])
    else:
        cut = {
            "vocab": _vocabulary(model["vocab"], position),
            "merges": [
                m for m in model["merges"] if _stays(merge_pair(m), model["vocab"], position)
            ],
        }
    return visit_tokenizer(raw, move) | {"added_tokens": added, "model": model | cut}


def _vocabulary(ids: dict[str, int], position: dict[int, int]) -> dict[str, int]:
    return {token: position[old] for token, old in ids.items() if old in position}


def _stays(pair: tuple[str, str], ids: dict[str, int], position: dict[int, int]) -> bool:
    """Whether both sides of a merge and its result are kept."""
    return all(ids.get(token) in position for token in (*pair, "".join(pair)))


def _side_files(
    source: Path,
    kept: tuple[int, ...],
    position: dict[int, int],
    tokens: dict[str, int],
    target: Path,
) -> None:
    present = {name for name in REWRITTEN if (source / name).is_file()}
    if "tokenizer_config.json" in present:
        config = renumber_ids(read_json(source / "tokenizer_config.json"), kept)
        if "added_tokens_decoder" in config:
            config["added_tokens_decoder"] = {
                str(position[int(old)]): token
                for old, token in config["added_tokens_decoder"].items()
                if int(old) in position
            }
        write_json(target / "tokenizer_config.json", config)
    for name in present & {"added_tokens.json", "vocab.json"}:
        write_json(target / name, _vocabulary(read_json(source / name), position))
    if "special_tokens_map.json" in present:  # it names tokens by their text alone
        names = (source / "special_tokens_map.json").read_text(encoding="utf-8")
        write_text(target / "special_tokens_map.json", names)
    if "merges.txt" in present:
        lines = (source / "merges.txt").read_bytes().decode("utf-8").split("\n")
        write_text(
            target / "merges.txt",
            "\n".join(line for line in lines if _line_stays(line, tokens, position)),
        )


def _line_stays(line: str, tokens: dict[str, int], position: dict[int, int]) -> bool:
    pair = line.rstrip("\r").split(" ")
    if len(pair) != 2 or line.startswith("#version"):
        return True
    return _stays((pair[0], pair[1]), tokens, position)


def _check_numbers(source: Path, kept: tuple[int, ...], target: Path) -> None:
    """The tokenizers library numbers some added tokens itself, so ask what it made of the file."""
    from tokenizers import Tokenizer

    before = Tokenizer.from_file(str(source / TOKENIZER))
    after = Tokenizer.from_file(str(target / TOKENIZER))
    for new, old in enumerate(kept):
        expected, actual = before.id_to_token(old), after.id_to_token(new)
        if expected != actual:
            raise ShearlingError(
                f"the cut tokenizer reads token {new} as {actual!r}, but it is token {old} of "
                f"{source}, {expected!r}; keep the whole vocabulary, and please report this."
            )
