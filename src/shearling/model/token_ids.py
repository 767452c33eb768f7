"""Token ids in configurations: where they stand, and what they become."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from shearling.errors import ShearlingError

Move = Callable[[int], int]

# bos_token_id, stop_token_ids, image_token_index, but not pad_token_type_id.
_ID_KEY = re.compile(r"(^|_)token_(id|ids|index)$")
_SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")


def renumber_ids(config: Mapping[str, Any], kept: tuple[int, ...]) -> dict[str, Any]:
    """A configuration whose token ids are positions in ``kept``; everything else as it is.

    Renumbered are ``*_token_id``, ``*_token_ids`` and ``*_token_index`` (an id or a list),
    ``suppress_tokens``, ``begin_suppress_tokens``, ``bad_words_ids``, ``force_words_ids``,
    ``forced_decoder_ids`` and ``sequence_bias``, in nested objects too. Negative ids stay: they
    stand for none. Where config.json leaves an id to its model class, and that default would now
    be another token, the new id is written out, or null if the token is gone.

    A token that may not be generated need not be kept: it leaves ``suppress_tokens``, and a
    sequence with it leaves ``bad_words_ids``. ``choose_tokens`` keeps every other id that is
    named and has a row of the embedding, so one that is gone is an error.

    Args:
        config: what config.json or generation_config.json holds.
        kept: source ids of the tokens that stay, ascending.

    Raises:
        ShearlingError: a named id is not kept.
    """
    position = {old: new for new, old in enumerate(kept)}

    def move(old: int) -> int:
        if old not in position:
            raise ShearlingError(
                f"the configuration names token id {old}, which is not among the {len(kept)} "
                "tokens kept; keep it, or take it out of the configuration."
            )
        return position[old]

    moved = visit(config, move, position.__contains__)
    for key, default in _class_defaults(config).items():
        if position.get(default) != default:
            moved[key] = position.get(default)
    return moved


def named_ids(config: Mapping[str, Any]) -> set[int]:
    """Ids that must stay because a configuration, or its model class, names them."""
    found: set[int] = set(_class_defaults(config).values())

    def note(old: int) -> int:
        found.add(old)
        return old

    visit(config, note, lambda _: False)
    return found


def visit(config: Mapping[str, Any], move: Move, has: Callable[[int], bool]) -> dict[str, Any]:
    """``config`` with ``move`` applied to its token ids; ``has`` says which may be moved."""
    return {key: _value(key, value, move, has) for key, value in config.items()}


def _value(key: str, value: Any, move: Move, has: Callable[[int], bool]) -> Any:
    if isinstance(value, Mapping):
        return visit(value, move, has)
    if _ID_KEY.search(key) or key == "force_words_ids":
        return _each(value, move)
    if not isinstance(value, list):
        return value
    if key in _SUPPRESSED:
        return [move(old) for old in value if has(old)]
    if key == "bad_words_ids":
        return [_each(words, move) for words in value if all(map(has, words))]
    if key == "forced_decoder_ids":
        return [[place, _each(old, move)] for place, old in value]
    if key == "sequence_bias":
        return [[_each(words, move), bias] for words, bias in value]
    return value


def _each(value: Any, move: Move) -> Any:
    """``move`` on an id, or on those of a list, however deep."""
    if isinstance(value, list):
        return [_each(one, move) for one in value]
    is_id = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return move(value) if is_id else value


def _class_defaults(config: Mapping[str, Any]) -> dict[str, int]:
    """Ids that the model class fills in where config.json names none, as Llama's 1 and 2."""
    if "model_type" not in config:
        return {}
    from transformers import CONFIG_MAPPING

    if config["model_type"] not in CONFIG_MAPPING:
        return {}
    return {
        key: value
        for key, value in CONFIG_MAPPING[config["model_type"]]().to_dict().items()
        if key not in config and _ID_KEY.search(key) and isinstance(value, int) and value >= 0
    }
