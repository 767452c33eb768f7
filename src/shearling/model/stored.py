"""What a directory's safetensors hold, by their headers alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from shearling.errors import ShearlingError, reason
from shearling.model.weight_files import weight_files

# Bytes of safetensors' types; those not named take one.
_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "U16": 2,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: where it is, its type by safetensors' name, and its sizes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def turned(self) -> StoredTensor:
        """The same with its last two dimensions in the other order."""
        return replace(self, shape=(*self.shape[:-2], self.shape[-1], self.shape[-2]))

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of each."""
        return _BYTES.get(self.dtype, 1)

    @property
    def bytes(self) -> int:
        """Bytes on disk."""
        return self.elements * self.itemsize


def stored_tensors(path: Path, files: Iterable[Path] | None = None) -> dict[str, StoredTensor]:
    """Tensor name -> what is stored, each name once, of the files that transformers would load.

    Args:
        path: the model's directory.
        files: other files than these.

    Raises:
        ShearlingError: a file is truncated or corrupt.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(path) if files is None else files:
        try:
            with safe_open(file, "pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - a handle is not a mapping
                    view = shard.get_slice(name)
                    sizes = tuple(view.get_shape())
                    tensors[name] = StoredTensor(file, view.get_dtype(), sizes)
        except SafetensorError as error:
            raise ShearlingError(
                f"{file} is truncated or corrupt ({reason(error)}, {file.stat().st_size} bytes); "
                "fetch it again."
            ) from error
    return tensors
