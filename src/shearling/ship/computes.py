"""Whether llama.cpp will compute with a file what the model computes: all but the weights.

The metadata are read as llama.cpp reads them, block types and the scale of attention counted as it
counts, and held against the configuration.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.model.gguf.config import read_config
from shearling.model.gguf.header import GgufFile
from shearling.model.gguf.weights import GgufWeights
from shearling.model.manifest import read_manifest
from shearling.pruning.pattern import Pattern, pattern_of, removal_words, scaled_otherwise
from shearling.ship.readback import differs
from shearling.table.families.llama_cpp import UNROTATED, LlamaCppFacts

_CLOSE = 1e-4  # relative; metadata are in single precision
_SLIDING = "attention.sliding_window_pattern"
# Metadata key of a list with an entry a block -> the kind of the blocks where it is true.
_LISTS = {_SLIDING: "sliding_attention", "attention.recurrent_layers": "linear_attention"}


def check_counted(source: Checkpoint) -> None:
    """Refuse a model that llama.cpp would take for another, or not take, before any work is done.

    Raises:
        ShearlingError: it would; where blocks are not of the kinds that it counts, the removals
            that would keep the pattern are named.
    """
    _check_limits(source)
    pattern = pattern_of(source.family, source.config)
    if pattern is None:
        return
    depth = len(pattern.kinds)
    if pattern.misread(source.config, range(depth)):
        counted = pattern.counted(depth)
        wrong = next(block for block in range(depth) if pattern.kinds[block] != counted[block])
        _refuse_rotated(source, pattern, wrong)
        raise ShearlingError(
            f"{source.name} cannot be exported to GGUF: llama.cpp counts blocks, and would run "
            f"block {wrong}, which is of {_words(pattern.kinds[wrong])}, with "
            f"{_words(counted[wrong])}; {_ways(source, pattern)}."
        )
    taken = scaled_otherwise(pattern, source.shape)
    if taken is not None:
        raise ShearlingError(
            f"{source.name} cannot be exported to GGUF: llama.cpp divides the attention of a "
            f"{pattern.facts.architecture} with {depth} blocks by the root of {taken}, where this "
            f"model's is divided by that of {pattern.scalar:g}; {_depths(source, pattern)}."
        )


def _check_limits(source: Checkpoint) -> None:
    """Refuse what llama.cpp's code for the architecture has built in otherwise."""
    facts = source.family.llama_cpp
    if facts is None:
        if source.layout.routed:  # too much beside the weights to trust the converter with
            raise ShearlingError(
                f"{source.name} cannot be exported to GGUF: it was never tried what llama.cpp "
                f"makes of the router and the experts of a {source.family.model_type} model; run "
                "it with transformers or vLLM."
            )
        return
    built_in = (
        f"{key}={value}, where this model has {key}={getattr(source.config, key, None)}"
        for key, value in facts.fixed.items()
        if not _alike(getattr(source.config, key, None), value)
    )
    wanted = (
        limit.wants.format(**source.shape) for limit in facts.broken(source.config, source.shape)
    )
    for wants in (*built_in, *wanted):
        raise ShearlingError(
            f"{source.name} cannot be exported to GGUF: llama.cpp's code for {facts.architecture} "
            f"wants {wants}; give another shape or model, or run it with transformers or vLLM."
        )


def _refuse_rotated(source: Checkpoint, pattern: Pattern, wrong: int) -> None:
    """Refuse a model whose blocks without rotary positions are not those that llama.cpp counts."""
    every = pattern.facts.unrotated
    if every is None:
        return
    has, runs = ("with", "without")
    if pattern.kinds[wrong] == UNROTATED:
        has, runs = runs, has
    raise ShearlingError(
        f"{source.name} cannot be exported to GGUF: llama.cpp runs every {every}th block without "
        f"rotary positions, and so block {wrong} {runs} them, which is {has} them here; "
        f"{_ways(source, pattern)}, or run it with transformers or vLLM."
    )


def check_computes(source: Checkpoint, file: GgufFile) -> None:
    """Hold what the metadata say, as llama.cpp reads them, against the source's configuration.

    Raises:
        ShearlingError: llama.cpp would compute something else; what, is named.
    """
    facts = source.family.llama_cpp
    if facts is None:  # the converter knows it, and we do not
        return
    if not facts.reads:
        _check_stated(source, file, facts)
        return
    try:
        _, read = read_config(file, GgufWeights(file).small)
    except ShearlingError as error:
        raise differs(f"does not say what the model computes ({str(error).rstrip('.')})") from error
    for what, has, runs in _differences(source, read, facts):
        raise differs(
            f"would run with {what} {_short(runs)}, where the model's is {_short(has)}, which "
            f"llama.cpp's converter or code does not know for {facts.architecture}"
        )


def _check_stated(source: Checkpoint, file: GgufFile, facts: LlamaCppFacts) -> None:
    """Compare the numbers that must arrive in a file that we do not read as a model."""
    config = source.config
    stated = dict((facts.epsilon, *facts.stated.items()))
    if facts.slides and facts.window is not None and getattr(config, facts.window, None):
        stated[facts.window] = "attention.sliding_window"
    for key, name in stated.items():
        has, says = getattr(config, key, None), file.get(name)
        if not _alike(has, says):
            raise differs(f"says {name}={says}, where the model has {key}={has}")
    kinds = list(getattr(config, "layer_types", None) or ())
    for key, kind in _LISTS.items():
        lists = file.get(key)
        if isinstance(lists, list) and [flag == 1 for flag in lists] != [k == kind for k in kinds]:
            raise differs(f"says {key}={lists}, where the model has layer_types={kinds}")
    counted = facts.kinds(len(kinds))
    if facts.listed and counted != tuple(kinds) and not isinstance(file.get(_SLIDING), list):
        raise differs(f"does not list {_SLIDING}, so that llama.cpp would count blocks")


def _differences(
    source: Checkpoint, read: Any, facts: LlamaCppFacts
) -> Iterator[tuple[str, object, object]]:
    """What differs, what the model has, and what llama.cpp will run."""
    config = source.config
    named = [facts.scalar, facts.window if facts.slides else None]
    for key in filter(None, [*facts.fixed, facts.epsilon[0], *facts.softcaps, *named]):
        has, runs = getattr(config, key, None), getattr(read, key, None)
        if not _alike(has, runs):
            yield key, has, runs
    if facts.period is not None and list(config.layer_types) != list(read.layer_types):
        yield "layer_types", config.layer_types, read.layer_types
    for kind in sorted(set(getattr(config, "layer_types", None) or [])) or [None]:
        for length in (1, config.max_position_embeddings):
            has, runs = _frequencies(config, kind, length), _frequencies(read, kind, length)
            if has.shape != runs.shape or not torch.allclose(has, runs, rtol=_CLOSE, atol=0):
                yield "rotary positions", _rope(config, kind), _rope(read, kind)
                return


def _alike(has: Any, runs: Any) -> bool:
    if isinstance(has, (int, float)) and isinstance(runs, (int, float)):
        return abs(has - runs) <= _CLOSE * abs(has)
    return {has, runs} <= {"silu", "swish"} or has == runs


def _frequencies(config: Any, kind: str | None, length: int) -> Tensor:
    """Rotary frequencies at a length of text, and the factor on what they turn."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = _rope(config, kind)
    if rope["rope_type"] != "default":
        nested = kind if kind in config.rope_parameters else None
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](
            config, "cpu", seq_len=length, layer_type=nested
        )
        return torch.cat([frequencies.float(), torch.tensor([float(factor)])])
    heads = config.hidden_size // config.num_attention_heads
    width = getattr(config, "head_dim", None) or heads
    turned = int(width * rope.get("partial_rotary_factor", 1.0))
    powers = torch.arange(0, turned, 2).float() / turned
    return torch.cat([1 / rope["rope_theta"] ** powers, torch.ones(1)])


def _rope(config: Any, kind: str | None) -> dict[str, Any]:
    rope = config.rope_parameters
    return rope.get(kind, rope)


def _words(kind: str) -> str:
    return f"{kind.split('_')[0]} attention"


def _ways(source: Checkpoint, pattern: Pattern) -> str:
    """Removals that would keep the pattern: of the model this one was cut from, or of itself."""
    manifest = read_manifest(source.path) or {}
    removed = (manifest.get("options") or {}).get("removed") or []
    before = len(pattern.kinds) + len(removed)
    whole = Pattern(pattern.facts, pattern.counted(before), pattern.scalar)
    kept = [block for block in range(before) if block not in removed]
    if removed and tuple(whole.kinds[block] for block in kept) == pattern.kinds:
        ways = whole.removals(len(removed))
        if ways:
            return (
                f"of the {before} blocks that it was cut from, remove {removal_words(ways)} "
                "instead (`shearling prune --keep-pattern` chooses the best of all such)"
            )
        depths = ", ".join(map(str, whole.depths()))
        return (
            f"of the {before} blocks that it was cut from, no {len(removed)} can go without "
            f"breaking the pattern; keep {depths} (with `shearling prune --keep-pattern`)"
        )
    for more in range(1, len(pattern.kinds)):
        ways = pattern.removals(more)
        if ways:
            return f"removing {removal_words(ways)} of it as well would bring it in order"
    return "no removal would bring its blocks in order"


def _depths(source: Checkpoint, pattern: Pattern) -> str:
    if len(pattern.kinds) == pattern.facts.scaled_depth:
        return f"keep another number of blocks than {pattern.facts.scaled_depth}"
    if pattern.facts.scaled_by(
        pattern.facts.scaled_depth or 0, source.shape["hidden"], source.shape["heads"], 0
    ) == pattern.scalar:  # fmt: skip
        return f"only with {pattern.facts.scaled_depth} blocks does it take the model's own"
    return "leave hidden and heads as they were, or run it with transformers or vLLM"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
