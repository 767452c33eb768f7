"""A sentencepiece vocabulary of a GGUF file as tokenizer.model, which llama.cpp's converter needs.

Without it, a Gemma 2 or Phi-3 that was read from a GGUF file could not be exported to one again.
Format: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

NORMAL, UNKNOWN, BYTE = 1, 2, 6  # of the kinds of pieces, which a GGUF file numbers alike
_BPE = 2


def sentencepiece_model(
    pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int], *, prefix: bool
) -> bytes | None:
    """A serialised ``ModelProto``.

    Args:
        pieces, scores, kinds: of each token, in order of their ids.
        prefix: whether a space is put before every text.

    Returns:
        None where sentencepiece would not load it: not one unknown piece, or an empty one.
    """
    kinds = kinds or [NORMAL] * len(pieces)
    if list(kinds).count(UNKNOWN) != 1 or "" in pieces or len(scores) != len(pieces):
        return None
    held = b"".join(
        _message(1, _message(1, piece.encode("utf-8")) + _float(2, score) + _number(3, kind))
        for piece, score, kind in zip(pieces, scores, kinds, strict=True)
    )
    unknown = list(kinds).index(UNKNOWN)
    trainer = _number(3, _BPE) + _number(4, len(pieces)) + _number(35, int(BYTE in kinds))
    trainer += _number(40, unknown) + _message(45, pieces[unknown].encode("utf-8"))
    normalizer = _message(1, b"identity") + _number(3, int(prefix)) + _number(4, 0) + _number(5, 1)
    return held + _message(2, trainer) + _message(3, normalizer)


def _varint(value: int) -> bytes:
    held = bytearray()
    while value > 127:
        held.append(value & 127 | 128)
        value >>= 7
    return bytes([*held, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _message(field: int, held: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(held)) + held
