"""Rotary positions of a GGUF file, as transformers' configurations state them.

Linear scaling and yarn stand in the metadata; Llama 3's factors and those of long contexts are
tensors, one number a pair of channels. Factors that follow Llama 3's rule are told by its four
numbers; any others are written out as they are, which ``longrope`` allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from shearling.errors import ShearlingError, shortened
from shearling.model.gguf.header import GgufFile

FACTORS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
_SCALING = "rope.scaling."
_CLOSE = 1e-4  # relative; factors are stored in single precision
_LLAMA3 = (1.0, 4.0)  # its low and high frequency factors, everywhere so far
_TRAINED = 8192  # tokens of context before its scaling
_NO_EXTRAPOLATION = "rope.scaling.yarn_ext_factor"

Read = Callable[[str], list[float]]  # a tensor's values by its name


def rope_parameters(file: GgufFile, read: Read, width: int, positions: int) -> dict[str, Any]:
    """``rope_parameters`` of a configuration: all blocks alike, the base included.

    Args:
        file: the header.
        read: gives a small tensor's values.
        width: channels of a head that turn.
        positions: the longest context.

    Raises:
        ShearlingError: a scaling that transformers cannot be told.
    """
    theta = file.number("rope.freq_base", 10000.0)
    if theta <= 0:
        raise _refusal(file, f"a base of rotary positions of {theta:g}")
    scaling = _by_tensors(file, read, theta, width, positions) or _by_metadata(file)
    return {"rope_type": "default"} | scaling | {"rope_theta": theta}


def _by_metadata(file: GgufFile) -> dict[str, Any]:
    factor = file.number(f"{_SCALING}factor", 0.0) or file.number("rope.scale_linear", 0.0) or 1.0
    # As llama.cpp reads it: a factor without a kind is linear.
    kind = str(file.get(f"{_SCALING}type") or "linear")
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise _refusal(file, f"a rotary scaling of the kind {kind!r} without its factors")
    plain = file.get(_NO_EXTRAPOLATION, 1.0) == 1.0
    if not plain or file.get(f"{_SCALING}yarn_log_multiplier"):
        raise _refusal(file, "a yarn scaling whose strength differs")
    original = int(file.number(f"{_SCALING}original_context_length", 0))
    if not original:
        raise _refusal(file, "a yarn scaling without the context it was trained with")
    yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for key, name in (
        ("yarn_attn_factor", "attention_factor"), ("attn_factor", "attention_factor"),
        ("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow"),
    ):  # fmt: skip
        if file.get(f"{_SCALING}{key}") is not None:
            yarn.setdefault(name, file.number(f"{_SCALING}{key}", 0.0))
    return yarn


def _by_tensors(
    file: GgufFile, read: Read, theta: float, width: int, positions: int
) -> dict[str, Any]:
    original = int(file.number(f"{_SCALING}original_context_length", 0)) or positions
    if FACTORS in file.tensors:
        if _by_metadata(file):
            raise _refusal(file, "a rotary scaling in its metadata and another in a tensor")
        factors = _pairs(file, read, FACTORS, width)
        return from_factors(factors, theta, width, original)
    if LONG not in file.tensors and SHORT not in file.tensors:
        return {}
    names = [name for name in (SHORT, LONG) if name not in file.tensors]
    if names:
        raise _refusal(file, f"rotary factors without {names[0]}")
    short, long = (_pairs(file, read, name, width) for name in (SHORT, LONG))
    scaling: dict[str, Any] = _written_out(short, long, original)
    if file.get(f"{_SCALING}attn_factor") is None:
        del scaling["attention_factor"]
    else:
        scaling["attention_factor"] = file.number(f"{_SCALING}attn_factor", 0.0)
    scaling["factor"] = max(1.0, positions / original)
    return scaling


def _pairs(file: GgufFile, read: Read, name: str, width: int) -> list[float]:
    factors = read(name)
    if len(factors) != width // 2 or not all(0 < factor < math.inf for factor in factors):
        raise _refusal(
            file, f"{len(factors)} rotary factors for {width // 2} pairs, or some not above 0"
        )
    return factors


def _written_out(short: list[float], long: list[float], original: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope", "factor": 1.0, "short_factor": short, "long_factor": long,
        "attention_factor": 1.0, "original_max_position_embeddings": original,
    }  # fmt: skip


def from_factors(
    factors: Sequence[float], theta: float, width: int, original: int
) -> dict[str, Any]:
    """A scaling that divides the frequency of each pair by its factor.

    Args:
        factors: one for each pair of channels.
        theta: the base of the frequencies.
        width: channels that turn.
        original: the context before scaling, if it is said, or else the longest.
    """
    scale = max(factors)
    if min(factors) >= scale * (1 - _CLOSE):
        return {} if abs(scale - 1) < _CLOSE else {"rope_type": "linear", "factor": scale}
    for low, high, trained in _llama3_numbers(factors, theta, width, original):
        rule = llama3_factors(theta, width, scale, low, high, trained)
        if all(math.isclose(a, b, rel_tol=_CLOSE) for a, b in zip(factors, rule, strict=True)):
            return {
                "rope_type": "llama3", "factor": scale, "low_freq_factor": low,
                "high_freq_factor": high, "original_max_position_embeddings": trained,
            }  # fmt: skip
    return _written_out(list(factors), list(factors), original)


def llama3_factors(
    theta: float, width: int, factor: float, low: float, high: float, trained: int
) -> list[float]:
    """What Llama 3's rule divides the frequency of each pair by.

    Source: transformers' ``_compute_llama3_parameters``.
    """
    factors = []
    for wave in _wavelengths(theta, width):
        smooth = (trained / wave - low) / (high - low)
        if wave < trained / high:
            factors.append(1.0)
        elif wave > trained / low:
            factors.append(factor)
        else:
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def _llama3_numbers(
    factors: Sequence[float], theta: float, width: int, original: int
) -> list[tuple[float, float, int]]:
    """Low and high factor and context that may explain the factors; most likely ones first."""
    low, high = _LLAMA3
    found = [(low, high, _TRAINED), (low, high, original)]
    scale, waves = max(factors), _wavelengths(theta, width)
    # Between its ends, the rule is a line in 1 / wavelength; each point on it gives the context.
    smooth = [
        (1 / wave, (1 / factor - 1 / scale) / (1 - 1 / scale))
        for factor, wave in zip(factors, waves, strict=True)
        if 1 + _CLOSE < factor < scale * (1 - _CLOSE)
    ]
    if smooth:
        inverse, share = smooth[len(smooth) // 2]
        found.append((low, high, round((share * (high - low) + low) / inverse)))
    if len(smooth) > 1:
        (x0, s0), (x1, s1) = smooth[0], smooth[-1]
        slope = (s1 - s0) / (x1 - x0)
        start = s0 - slope * x0
        for trained in (_TRAINED, original):
            span = trained / slope
            found.append((round(-start * span, 4), round((1 - start) * span, 4), trained))
    else:  # the ends alone: any context between them will do
        plain = max((w for f, w in zip(factors, waves, strict=True) if f == 1), default=0.0)
        scaled = min((w for f, w in zip(factors, waves, strict=True) if f == scale), default=0.0)
        found.append((low, high, round((high * plain * low * scaled) ** 0.5)))
    return [(a, b, trained) for a, b, trained in found if 0 < a < b and trained > 0]


def _wavelengths(theta: float, width: int) -> list[float]:
    return [2 * math.pi * theta ** (2 * pair / width) for pair in range(width // 2)]


def _refusal(file: GgufFile, what: str) -> ShearlingError:
    return ShearlingError(
        f"{file.path} states {shortened(what)}, which transformers cannot be told for "
        f"{file.architecture}; give the model's safetensors instead."
    )
