"""Names of types: what a user writes, what safetensors writes, and torch's own."""

from __future__ import annotations

import torch

from shearling.errors import ShearlingError

# What models are run in, by the name that a user gives.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What weights that can be cut are stored in, by safetensors' name.
STORED = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def dtype_of(name: str) -> torch.dtype:
    """torch's type for the name that a user gives.

    Raises:
        ShearlingError: a model cannot be run in such a type.
    """
    if name not in DTYPES:
        raise ShearlingError(f"The dtype {name!r} is not known here; give {', '.join(DTYPES)}.")
    return DTYPES[name]


def torch_dtype(name: str) -> torch.dtype:
    """torch's type for a safetensors type name.

    Raises:
        ShearlingError: weights stored so cannot be cut.
    """
    if name not in STORED:
        raise ShearlingError(
            f"weights are stored as {name}, but shearling cuts {', '.join(STORED)}; "
            "give the checkpoint from before quantisation."
        )
    return STORED[name]


def name_of(dtype: torch.dtype) -> str:
    """A type's name as a user writes it, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
