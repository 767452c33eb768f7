"""What a model needs of a GPU, what the card has, and what to say if that does not go together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from shearling.engine.devices import has_bfloat16, num_gpus
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.model.dtypes import name_of
from shearling.model.memory import free_bytes

LOGITS_BYTES = 2**29  # alive at a time
MARGIN = 2**30  # bytes that libraries and fragmentation take


@dataclass(frozen=True, slots=True)
class Demand:
    """Bytes of a device that a model takes while its blocks run, states aside.

    Attributes:
        block: one block's weights.
        blocks: those of all.
        streamed: all that is needed where one block is there at a time.
    """

    block: int
    blocks: int
    streamed: int

    @property
    def whole(self) -> int:
        """All that is needed where every block is there."""
        return self.streamed + self.blocks

    @staticmethod
    def of(checkpoint: Checkpoint, dtype: torch.dtype) -> Demand:
        """With blocks in ``dtype``; what computes takes some blocks' worth."""
        layers = checkpoint.shape["layers"]
        block = checkpoint.layout.count_block(checkpoint.shape) * dtype.itemsize
        outside = resident_bytes(checkpoint, dtype) - block * layers
        return Demand(block, block * layers, outside + MARGIN + LOGITS_BYTES * 3 + 6 * block)


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU: its name, and bytes of its memory."""

    device: torch.device
    name: str
    total: int
    free: int

    @staticmethod
    def of(device: torch.device) -> Card:
        """Ask the card (ShearlingError if it is so full that it does not even answer)."""
        try:
            name = torch.cuda.get_device_name(device)
            free, total = torch.cuda.mem_get_info(device)
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            raise ShearlingError(
                f"{device} is full: other programs hold all of its memory; end them, name another "
                "card (--device cuda:N), or give --device cpu."
            ) from None
        return Card(device, name, total, free)


def resident_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes of a model in memory: blocks in ``dtype``, the rest in float32 at least."""
    blocks = checkpoint.layout.count_block(checkpoint.shape) * checkpoint.shape["layers"]
    outside = checkpoint.parameters - blocks
    return blocks * dtype.itemsize + outside * max(4, dtype.itemsize)


def require_room(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    card: Card,
    memory: int | None = None,
    *,
    whole: bool = False,
    others: Callable[[], list[Card]] | None = None,
) -> None:
    """Raise ShearlingError, naming what was asked, what is free and what would fit, if it is less.

    Args:
        checkpoint, dtype: the model, and what its blocks are in.
        card: where it is to run.
        memory: bytes that may be used at most, as the user said.
        whole: whether all blocks have to be there at once, as the user said.
        others: gives the other cards of the machine.
    """
    demand = Demand.of(checkpoint, dtype)
    asked = demand.whole if whole else demand.streamed
    allowed = capped(card.free, memory)
    if asked <= allowed:
        return
    how = "whole" if whole else "even with one block there at a time"
    there = f"{gb(card.free)} of its {gb(card.total)} are free"
    if memory is not None and memory < card.free:
        there = f"--memory allows {gb(memory)}"
    raise ShearlingError(
        f"{checkpoint.name} needs {gb(asked)} on {card.device} ({card.name}) in {name_of(dtype)}, "
        f"{how}, but {there}; {_advice(checkpoint, dtype, card, memory, whole, others)}."
    )


def _advice(
    checkpoint: Checkpoint, dtype: torch.dtype, card: Card, memory: int | None, whole: bool,
    others: Callable[[], list[Card]] | None,
) -> str:  # fmt: skip
    """What would fit."""
    demand = Demand.of(checkpoint, dtype)
    allowed = capped(card.free, memory)
    if whole and demand.streamed <= allowed:
        return f"leave out --no-stream, and {gb(demand.streamed)} are enough"
    asked = demand.whole if whole else demand.streamed
    if asked <= card.free:
        return f"give --memory {gb(asked + 10**8).replace(' ', '')} or more"
    if dtype == torch.float32 and has_bfloat16(card.device):
        half = Demand.of(checkpoint, torch.bfloat16).streamed
        if half <= allowed:
            return f"--dtype bfloat16 needs {gb(half)}, which fits"
    roomy = [other for other in (others or other_cards(card))() if other.free >= asked]
    if roomy:
        most = max(roomy, key=lambda other: other.free)
        return f"--device {most.device} has {gb(most.free)} free"
    taken = card.total - card.free
    used = f"end what holds the other {gb(taken)}, or " if card.total >= asked else ""
    return f"{used}give --device cpu"


def other_cards(card: Card) -> Callable[[], list[Card]]:
    """Asks the machine's other cards, when called."""

    def ask() -> list[Card]:
        devices = (torch.device("cuda", number) for number in range(num_gpus()))
        return [
            Card(other, "", 0, free_bytes(str(other)) or 0)
            for other in devices
            if other != card.device
        ]

    return ask


def capped(free: int, memory: int | None) -> int:
    """Bytes that may be used of those that are free, where the user allows at most ``memory``."""
    return free if memory is None else min(free, memory)


def gb(count: float) -> str:
    """Bytes for a person."""
    return f"{count / 1e9:.1f} GB"
