"""A GGUF file's metadata and table of tensors, read from the file as it lies on disk.

Every length is held against what is left of the file before anything of that length is made, so
that a damaged file is a sentence and costs neither memory nor time. Nothing of the weights is read.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError, shortened

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
_FORMATS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_DIMENSIONS = 4
_LONGEST_NAME = 65535  # a key's; the format's own limit


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies.

    Attributes:
        sizes: as torch counts them, rows first.
        kind: ggml's number of its type.
        start: its first byte in the file.
    """

    sizes: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says of itself.

    Attributes:
        path: the file.
        metadata: key -> number, text, truth, or a list of such.
        tensors: name -> where it lies.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @staticmethod
    def open(path: Path) -> GgufFile:
        """Read the header of ``path``.

        Raises:
            ShearlingError: no GGUF file, a damaged one, or one part of several.
        """
        try:
            with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=1) as data:
                return _read(path, data)
        except (ValueError, OSError) as error:  # an empty file cannot be mapped
            raise damaged(path, str(error)) from error

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model's architecture."""
        return str(self.metadata["general.architecture"])

    def get(self, key: str, default: Any = None) -> Any:
        """A value behind the architecture's name, such as ``block_count``."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def number(self, key: str, default: float) -> float:
        """A number behind the architecture's name; ``default`` where there is none.

        Raises:
            ShearlingError: it is something else, infinite or none (NaN).
        """
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise damaged(self.path, f"{key} is {value!r}, and a number was expected")
        return float(value)

    def own_keys(self) -> list[str]:
        """Keys behind the architecture's name, without it."""
        prefix = f"{self.architecture}."
        return [key.removeprefix(prefix) for key in self.metadata if key.startswith(prefix)]


def damaged(path: Path, why: str) -> ShearlingError:
    """The sentence for a file that is not what it should be."""
    return ShearlingError(
        f"{path} is no whole GGUF file ({shortened(why)}); fetch it again, or give the model's "
        "safetensors."
    )


class _Cursor:
    """A place in the file; every read is held against the file's end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.end = path, data, 0, len(data)

    def numbers(self, kind: str, count: int = 1) -> tuple[Any, ...]:
        """So many numbers of a type of ``struct``'s."""
        size = struct.calcsize(f"<{kind}") * count
        self.require(size)
        values = struct.unpack_from(f"<{count}{kind}", self.data, self.at)
        self.at += size
        return values

    def text(self) -> str:
        """A text behind its length in bytes."""
        (length,) = self.numbers("Q")
        self.require(length)
        start, self.at = self.at, self.at + length
        try:
            return self.data[start : self.at].decode("utf-8")
        except UnicodeDecodeError as error:
            raise damaged(self.path, f"byte {start} begins a text that is not UTF-8") from error

    def require(self, size: int) -> None:
        """Refuse to read beyond the end."""
        if size > self.end - self.at:
            raise damaged(self.path, f"it ends at byte {self.end}, inside its header")


def _read(path: Path, data: mmap.mmap) -> GgufFile:
    cursor = _Cursor(path, data)
    if data[:4] != MAGIC:
        raise damaged(path, "it does not begin with the letters GGUF")
    cursor.at = 4
    (version,) = cursor.numbers("I")
    if version not in VERSIONS:
        how = "big-endian" if version >> 16 else f"version {version}"
        raise ShearlingError(
            f"{path} is a GGUF file of {how}, and version 2 or 3, little-endian, is read; convert "
            "the model again."
        )
    tensors, keys = cursor.numbers("Q", 2)
    for count, least in ((tensors, 24), (keys, 13)):  # bytes of the shortest entry
        cursor.require(count * least)
    metadata = _metadata(cursor, keys)
    if not isinstance(metadata.get("general.architecture"), str):
        raise damaged(path, "it does not name an architecture")
    parts = metadata.get("split.count")
    if isinstance(parts, int) and parts > 1:
        raise ShearlingError(
            f"{path} is one part of {parts}; join them with llama.cpp's "
            "`llama-gguf-split --merge` and give the whole."
        )
    return GgufFile(path, metadata, _tensors(cursor, tensors, metadata))


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.text()
        if key in metadata or len(key) > _LONGEST_NAME:
            raise damaged(cursor.path, f"the key {key[:40]!r} stands there twice or is too long")
        (kind,) = cursor.numbers("I")
        metadata[key] = _value(cursor, kind)
    return metadata


def _value(cursor: _Cursor, kind: int) -> Any:
    if kind in _FORMATS:
        return cursor.numbers(_FORMATS[kind])[0]
    if kind == _STRING:
        return cursor.text()
    if kind != _ARRAY:
        raise damaged(cursor.path, f"a value is of the unknown type {kind}")
    (inner,) = cursor.numbers("I")
    (count,) = cursor.numbers("Q")
    if inner in _FORMATS:
        return list(cursor.numbers(_FORMATS[inner], count))
    if inner != _STRING:
        raise damaged(cursor.path, f"a list holds values of the unknown type {inner}")
    cursor.require(8 * count)
    return [cursor.text() for _ in range(count)]


def _tensors(cursor: _Cursor, count: int, metadata: Mapping[str, Any]) -> dict[str, GgufTensor]:
    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = cursor.text()
        (dimensions,) = cursor.numbers("I")
        if name in entries or not 1 <= dimensions <= _DIMENSIONS:
            raise damaged(cursor.path, f"the tensor {name[:40]!r} is there twice or has no sizes")
        sizes = cursor.numbers("Q", dimensions)
        (kind,) = cursor.numbers("I")
        (offset,) = cursor.numbers("Q")
        entries[name] = (sizes[::-1], kind, offset)
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
        raise damaged(cursor.path, f"its tensors are aligned to {alignment}")
    begin = -(-cursor.at // alignment) * alignment
    return {
        name: _placed(cursor, name, sizes, kind, begin + offset)
        for name, (sizes, kind, offset) in entries.items()
    }


def _placed(
    cursor: _Cursor, name: str, sizes: tuple[int, ...], kind: int, start: int
) -> GgufTensor:
    values, width = block_of(cursor.path, name, kind)
    count = math.prod(sizes)
    if count < 1 or sizes[-1] % values:
        raise damaged(cursor.path, f"the tensor {name} has the sizes {list(sizes)}")
    if start + count // values * width > cursor.end:
        raise damaged(cursor.path, f"the tensor {name} would end behind the end of the file")
    return GgufTensor(sizes, kind, start)


def block_of(path: Path, name: str, kind: int) -> tuple[int, int]:
    """Values, and bytes, of one block of a type (ShearlingError if it is not known)."""
    gguf = gguf_package()
    try:
        return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    except (KeyError, ValueError) as error:
        raise damaged(path, f"the tensor {name} is of the unknown type {kind}") from error


def gguf_package() -> Any:
    """The gguf package (ShearlingError if it is not installed)."""
    try:
        import gguf
    except ImportError:
        raise ShearlingError(
            "the gguf package, which reads GGUF files, is not installed; run "
            "`pip install 'shearling[gguf]'`."
        ) from None
    return gguf
