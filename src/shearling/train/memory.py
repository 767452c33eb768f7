"""What fits in a GPU's memory: how many sequences at a time, and whether activations are kept.

Bytes a token of what the backward pass needs, counted on the stock modules of a gated-MLP block
under autocast: the stream in float32, each norm's normalised state beside it, a cast copy for each
of the projections behind a norm, and in the MLP both branches, the activation and the product. In
float32 the casts are no copies, but all else is twice as large. With checkpointing a block's input
alone is kept, and one block's rest while it is computed anew. An estimate, on the high side: where
it is too low, the loop halves what it takes at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shearling.engine.place import CONTEXT_BYTES
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.model.memory import free_bytes
from shearling.train.adapters import adapted_rows
from shearling.train.device import Numbers
from shearling.train.options import Options

MICRO_TOKENS = 2048  # at a time on a CPU, unless the user says
MOST_TOKENS = 32_768  # at a time on a GPU: more gains nothing
ENOUGH_TOKENS = 4096  # at a time on a GPU; where fewer fit, activations are computed anew
SHARE = 0.9  # of the free memory that is planned with
STREAM_BYTES = {torch.bfloat16: 36, torch.float32: 64}  # a token, channel and block
MLP_BYTES = {torch.bfloat16: 8, torch.float32: 16}  # a token, neuron and block


@dataclass(frozen=True)
class Fit:
    """How a step is laid out in memory.

    Attributes:
        micro: sequences at a time.
        checkpointing: whether blocks' activations are computed anew in the backward pass.
    """

    micro: int
    checkpointing: bool


@dataclass(frozen=True)
class MemoryBudget:
    """What there is to fit into.

    Attributes:
        free: bytes on the device, with everything there that is there before the first step;
            None on a CPU, whose memory is not planned.
        length: tokens of a sequence.
        rows: sequences of one rank in a step.
        ranks: over which weights, gradients and moments are divided.
        numbers: what is computed in and kept.
        gated: whether gates are learned, whose weights are held twice.
    """

    free: int | None
    length: int
    rows: int
    ranks: int
    numbers: Numbers
    gated: bool = False


def free_on_gpu(device: torch.device, allowed: int | None = None) -> int | None:
    """Bytes that this process can still take on a GPU; None on a CPU.

    Args:
        device: the GPU.
        allowed: bytes of it that the process may have at most, with what it has now.
    """
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    free = free_bytes(str(device))
    if free is None or allowed is None:
        return free
    return min(free, max(0, allowed - CONTEXT_BYTES - torch.cuda.memory_allocated(device)))


def fit(source: Checkpoint, options: Options, budget: MemoryBudget) -> Fit:
    """Sequences at a time and checkpointing, as the options say, else as memory allows.

    Raises:
        ShearlingError: not even one sequence fits, by the estimate's own lower half.
    """
    if budget.free is None:
        micro = options.micro or max(1, MICRO_TOKENS // budget.length)
        return Fit(micro, bool(options.checkpointing))
    if options.micro is not None and options.checkpointing is not None:
        return Fit(options.micro, options.checkpointing)
    left = SHARE * budget.free - standing(source, options, budget)
    if left <= 0:
        needed = (SHARE * budget.free - left) / 1e9
        raise ShearlingError(
            f"{budget.free / 1e9:.1f} GB are free on the device, but gradients and the optimiser "
            f"of {source.parameters:,} parameters take about {needed:.1f} "
            "GB; use optimizer=adamw8bit with weight_dtype=bfloat16, --recipe lora, or more GPUs."
        )
    fitting = {
        anew: int(left // (budget.length * token_bytes(source, budget.numbers, checkpointing=anew)))
        for anew in (False, True)
    }
    anew = options.checkpointing
    if anew is None:
        wanted = options.micro or max(1, min(budget.rows, ENOUGH_TOKENS // budget.length))
        anew = fitting[False] < wanted
    most = max(1, min(fitting[anew], budget.rows, max(1, MOST_TOKENS // budget.length)))
    passes = -(-budget.rows // most)
    return Fit(options.micro or -(-budget.rows // passes), anew)


def standing(source: Checkpoint, options: Options, budget: MemoryBudget) -> int:
    """Bytes that a step takes however few tokens it sees, weights aside."""
    trained, size = source.parameters, budget.numbers.kept.itemsize
    if options.recipe == "lora":
        trained = adapter_parameters(source, options.rank)
    moments = 2 if options.optimizer == "adamw8bit" else 2 * size
    total = trained * (size + moments) // budget.ranks
    if budget.numbers.autocast:  # the casts of a forward pass, which the backward pass reads
        total += source.parameters * budget.numbers.computed.itemsize
    if budget.gated:  # and their gradients; at most all of the weights
        total += source.parameters * 2 * size
    head = source.shape["vocab"] * source.shape["hidden"] * 4
    return total + head + 4 * 2**30  # logits of a chunk, the libraries' own, fragments


def token_bytes(source: Checkpoint, numbers: Numbers, *, checkpointing: bool) -> int:
    """Bytes of activations a token."""
    shape, dtype = source.shape, numbers.computed
    block = shape["hidden"] * STREAM_BYTES[dtype] + shape.get("mlp", 0) * MLP_BYTES[dtype]
    stream = shape["hidden"] * (4 if numbers.autocast else numbers.kept.itemsize)
    kept = stream * shape["layers"] + block if checkpointing else block * shape["layers"]
    # A head that is more than a product has all its logits in memory, and their gradients.
    return kept + 8 * stream + (0 if source.plain_head else 14 * shape["vocab"])


def adapter_parameters(source: Checkpoint, rank: int) -> int:
    """Of LoRA beside every projection."""
    adapted, shape = set(adapted_rows(source)), source.shape
    rows = (row for row, _ in source.layout.places(shape).values() if row in adapted)
    return sum(rank * sum(dim.size(shape) for dim in row.dims) for row in rows)
