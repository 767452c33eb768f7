"""Devices by the names that users give them, and what a device can compute in."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch

from shearling.errors import ShearlingError, in_words
from shearling.model.dtypes import dtype_of

# On a GPU, models below compute in float32: they are quick in any type, and keep every digit.
SMALL = 10**9  # parameters
OURS = ("auto", "cpu", "cuda")  # the names of devices that models are also cut on


def named_device(name: str) -> torch.device:
    """A device by the name a user gives it.

    Raises:
        ShearlingError: an unknown name, or a device that is not there.
    """
    gpus = num_gpus()
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if gpus else torch.device("cpu")
    kind, _, number = name.partition(":")
    if name == "cpu":
        return torch.device("cpu")
    if kind != "cuda" or (number and not number.isdecimal()):
        raise ShearlingError(f"--device {name} was given, but auto, cpu, cuda or cuda:N is meant.")
    if int(number or 0) >= gpus:
        there = "there is no GPU that torch can use"
        if gpus:
            there = f"the last GPU that torch sees is cuda:{gpus - 1}"
        raise ShearlingError(
            f"--device {name} was given, but {there}; give {'that, or ' if gpus else ''}"
            "--device cpu."
        )
    return torch.device("cuda", int(number) if number else torch.cuda.current_device())


def own_device(name: str = "auto", number: int = 0, processes: int = 1) -> torch.device:
    """The device of one of several processes on a machine; each takes the GPU of its own number.

    Args:
        name: what the user gave: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        number: of the process on its machine, from 0.
        processes: how many there are on this machine.

    Raises:
        ShearlingError: an unknown name, a device that is not there, fewer GPUs than processes, or
            one GPU named for several processes.
    """
    device = named_device(name)
    if device.type == "cpu":
        return device
    if ":" in name:
        if processes > 1:
            raise ShearlingError(
                f"--device {name} was given to {processes} processes of one machine, but each "
                "takes a GPU of its own; give --device cuda, or start one process."
            )
        return device
    if number >= num_gpus():
        raise ShearlingError(
            f"{processes} processes were started on this machine, but it has {num_gpus()} GPUs and "
            f"each process takes one; start at most {num_gpus()} (--nproc-per-node), or give "
            "--device cpu."
        )
    return torch.device("cuda", number)


def measured_on(
    device: str, dtype: str, parameters: Iterable[int], *, ours: bool = True
) -> tuple[str, str]:
    """Names of the device and the type that whole models are measured with, ``auto`` settled.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, or another that torch knows, as ``mps``.
        dtype: ``auto``, or a name of :data:`shearling.model.dtypes.DTYPES`. ``auto`` takes one for
            all models, since figures in two types do not compare.
        parameters: of each model.
        ours: whether this process computes; a server has a torch of its own, that may see others.

    Raises:
        ShearlingError: a device that is not there, or a type that it cannot compute in.
    """
    if dtype != "auto":
        dtype_of(dtype)
    if device != "auto" and not ours:
        return device, "float32" if dtype == "auto" else dtype
    known = device.partition(":")[0] in OURS
    taken = named_device(device) if known else _other_device(device)
    if dtype == "bfloat16" and taken.type == "cuda":
        require_bfloat16(taken)
    if dtype == "auto":
        large = taken.type == "cuda" and max(parameters, default=0) >= SMALL
        dtype = "bfloat16" if large and has_bfloat16(taken) else "float32"
    return str(taken), dtype


def _other_device(name: str) -> torch.device:
    """A device of another kind than ours, if torch can compute there."""
    with in_words(
        lambda _: f"torch has no device {name!r} here (--device); give auto, cpu, cuda or cuda:N."
    ):
        torch.ones(1, device=name).item()
    return torch.device(name)


def num_gpus() -> int:
    """How many GPUs torch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def has_bfloat16(device: torch.device) -> bool:
    """Whether a GPU computes in bfloat16 itself."""
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def processor_has_bfloat16() -> bool:
    """Whether the processor has a unit for products in bfloat16 (AMX), as far as torch tells."""
    told = getattr(torch.cpu, "get_capabilities", dict)()  # older torch has none
    return bool(told.get("amx_bf16"))


def require_bfloat16(device: torch.device) -> None:
    """Raise ShearlingError unless a GPU computes in bfloat16."""
    if not has_bfloat16(device):
        name = torch.cuda.get_device_name(device)
        raise ShearlingError(f"{name} does not compute in bfloat16; give --dtype float32.")


def give_back_memory() -> None:
    """Let other processes have the GPU memory that dropped tensors of this one have left."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
