"""Where training runs, in which numbers it computes, and why; the command line says so."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shearling.engine.devices import processor_has_bfloat16, require_bfloat16
from shearling.model.memory import free_bytes


@dataclass(frozen=True)
class Numbers:
    """What is computed in and kept.

    Attributes:
        computed: dtype of the blocks' products.
        kept: dtype of the weights that are trained.
    """

    computed: torch.dtype
    kept: torch.dtype

    @property
    def autocast(self) -> bool:
        """Whether float32 weights are cast as they are used."""
        return self.computed != self.kept


def numbers(dtype: str, weight_dtype: str, device: torch.device) -> Numbers:
    """From the options ``dtype`` and ``weight_dtype``: by itself bfloat16 on GPUs that have it."""
    kept = torch.bfloat16 if weight_dtype == "bfloat16" else torch.float32
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cuda" and "bfloat16" in (dtype, weight_dtype):
        require_bfloat16(device)
    half = dtype == "bfloat16" or kept == torch.bfloat16 or (dtype == "auto" and able)
    return Numbers(torch.bfloat16 if half else torch.float32, kept)


def described(device: torch.device, dtype: str, weight_dtype: str, asked: str = "auto") -> str:
    """A sentence for the terminal: the device and the numbers taken, and why."""
    taken = numbers(dtype, weight_dtype, device)
    if device.type == "cuda":
        free = free_bytes(str(device)) or 0
        total = torch.cuda.get_device_properties(device).total_memory
        where = (
            f"{device} ({torch.cuda.get_device_name(device)}, {free / 1e9:.0f} of "
            f"{total / 1e9:.0f} GB free)"
        )
    else:
        where = str(device)
    if asked != "auto":
        why = "as --device says"
    else:
        why = "torch sees a GPU" if device.type == "cuda" else "torch sees no GPU"
    half = taken.computed == torch.bfloat16
    in_numbers = "bfloat16" if half else "float32"
    if dtype != "auto" or taken.kept == torch.bfloat16:
        reason = "as was asked for"
    elif half:
        reason = "which this GPU multiplies fastest"
    elif device.type == "cuda":
        reason = "since this GPU has no bfloat16"
    else:
        reason = "as on every CPU"
        if processor_has_bfloat16():
            reason += " (this one is faster with --dtype bfloat16)"
    kept = "bfloat16" if taken.kept == torch.bfloat16 else "float32"
    return (
        f"training on {where}, {why}; products in {in_numbers}, {reason}; weights kept in {kept}."
    )
