"""The weights of a GGUF file, in float32, a few rows at a time."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor

from shearling.errors import ShearlingError
from shearling.model.gguf.header import GgufFile, block_of, gguf_package

_ROWS_VALUES = 2**22  # values that are unpacked at once


class GgufWeights:
    """A file's tensors, unpacked as they are asked for; the file is mapped, not read."""

    def __init__(self, file: GgufFile) -> None:
        """Map the file."""
        self.file = file
        self.bytes: Any = numpy.memmap(file.path, mode="r", dtype=numpy.uint8)

    def read(self, name: str) -> Tensor:
        """A tensor in float32, as torch counts its sizes.

        Raises:
            ShearlingError: a type that the gguf package cannot unpack.
        """
        stored = self.file.tensors[name]
        values, width = block_of(self.file.path, name, stored.kind)
        columns = stored.sizes[-1]
        rows = torch.Size(stored.sizes).numel() // columns
        row_bytes = columns // values * width
        packed = self.bytes[stored.start : stored.start + rows * row_bytes].reshape(rows, row_bytes)
        out = torch.empty(rows, columns)
        step = max(1, _ROWS_VALUES // columns)
        for row in range(0, rows, step):
            out.numpy()[row : row + step] = self._unpacked(
                packed[row : row + step], name, stored.kind
            )
        return out.view(stored.sizes)

    def small(self, name: str) -> list[float]:
        """A short tensor's values."""
        return self.read(name).flatten().tolist()

    def _unpacked(self, packed: Any, name: str, kind: int) -> Any:
        gguf = gguf_package()
        kind = gguf.GGMLQuantizationType(kind)
        plain = {"F32": numpy.float32, "F16": numpy.float16, "F64": numpy.float64}
        if kind.name in plain:
            packed = packed.view(plain[kind.name])
        try:
            return gguf.dequantize(packed, kind)
        except (NotImplementedError, ValueError, KeyError) as error:
            raise ShearlingError(
                f"{self.file.path} holds {name} as {kind.name}, which the gguf package cannot "
                "unpack; give the model in another type, or its safetensors."
            ) from error
