"""Where a model runs block by block: device, arithmetic, and where weights and states wait.

A :class:`Place` is chosen once for a command, by the memory that is free for weights *and* states,
and handed to everything that runs a model. Nothing outside this room and ``train`` names a device.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from shearling.engine.card import LOGITS_BYTES as GPU_LOGITS_BYTES
from shearling.engine.card import Card, Demand, capped, gb, require_room, resident_bytes
from shearling.engine.devices import SMALL, has_bfloat16, named_device, require_bfloat16
from shearling.engine.products import fast_products
from shearling.engine.ranks import ALONE, Ranks
from shearling.engine.room import Room, roomiest
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.model.dtypes import name_of
from shearling.model.memory import free_bytes

Weights = Literal["resident", "pinned", "disk"]
Shelf = Literal["device", "host", "disk"]

BATCH_TOKENS = 2048  # fill a processor's caches; more is slower there
LOGITS_BYTES = 16 * 2**20  # what a processor keeps close; more is slower
GPU_BATCH_TOKENS = 16_384
LEAST_TOKENS = 1024  # on a GPU; what does not fit is halved as it runs
CONTEXT_BYTES = 600 * 2**20  # of a GPU: CUDA's own and its libraries', outside of torch's sight
IDLE_CAP = "--memory is of a GPU, and says nothing here."
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h


@dataclass(frozen=True, slots=True)
class Place:
    """Where and how blocks run.

    Attributes:
        device: what computes.
        dtype: of the blocks' weights and products. What lies outside the blocks, states, sums and
            solutions are float32 or better.
        weights: where a block waits that is not in use: on the device, in pinned memory of the
            host (copied while the block before it computes), or in its file.
        states: where states between blocks wait.
        batch_tokens: tokens that run at a time.
        logits_bytes: bytes of logits, in float32, that are alive at a time.
        tf32: whether float32 products on the device round their factors to TF32; never in a proof.
        spare: bytes of a GPU that neither weights nor states take.
        allowed: bytes of the device that may be used at most; None for all that are free.
        scratch: directory for states on disk; None where they are not, or for the system's own.
        ranks: processes that share the sequences of a walk.
        reasons: sentences for the user on what was chosen.
        tell: told these when a model is opened here.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    weights: Weights = "resident"
    states: Shelf = "host"
    batch_tokens: int = 0
    logits_bytes: int = 0
    tf32: bool = False
    spare: int = 0
    allowed: int | None = None
    scratch: Path | None = None
    ranks: Ranks = ALONE
    reasons: tuple[str, ...] = ()
    tell: Callable[[str], None] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Fill in the sizes that suit the device."""
        gpu = self.device.type != "cpu"
        if not self.batch_tokens:
            object.__setattr__(self, "batch_tokens", GPU_BATCH_TOKENS if gpu else BATCH_TOKENS)
        if not self.logits_bytes:
            object.__setattr__(self, "logits_bytes", GPU_LOGITS_BYTES if gpu else LOGITS_BYTES)

    @staticmethod
    def cpu(*, streamed: bool = False) -> Place:
        """The processor, with the model in memory or read block by block."""
        waiting: tuple[Weights, Shelf] = ("disk", "disk") if streamed else ("resident", "host")
        return Place(torch.device("cpu"), weights=waiting[0], states=waiting[1])

    @staticmethod
    def best(checkpoint: Checkpoint, wish: Wish | None = None, need: Need | None = None) -> Place:
        """The place that suits a model, a task and the memory that is free.

        Args:
            checkpoint: the model.
            wish: what the user asked for.
            need: how much the task keeps between two blocks.

        Raises:
            ShearlingError: a device that is not there, a type that it cannot compute in, or less
                memory than one block needs.
        """
        wish = wish or Wish()
        need = (need or Need()).shared(wish.ranks.size)
        device = wish.torch_device()
        dtype = wish.torch_dtype(device, checkpoint)
        if device.type == "cpu":
            return _on_cpu(checkpoint, dtype, wish, need)
        return _on_gpu(checkpoint, device, dtype, wish, need)

    @property
    def streamed(self) -> bool:
        """Whether blocks are read from their files each time."""
        return self.weights == "disk"

    @property
    def merged_tokens(self) -> int:
        """How many tokens of several states run together: none on a processor."""
        return 0 if self.device.type == "cpu" else self.batch_tokens

    def for_proof(self, dtype: torch.dtype = torch.float32) -> Place:
        """The same for a proof: no TF32; each block is needed once, so none is kept.

        One process proves by itself.
        """
        return replace(
            self, dtype=dtype, tf32=False, weights="disk", states="host", tell=None, ranks=ALONE
        )

    def holds(self, checkpoint: Checkpoint, dtype: torch.dtype) -> bool:
        """Whether a model can be loaded whole, in one type, with as much again left free."""
        return self.room_for(checkpoint.parameters, dtype)

    def room_for(self, parameters: int, dtype: torch.dtype) -> bool:
        """The same of a model of so many parameters."""
        if self.streamed:
            return False
        free = capped(free_bytes(str(self.device)) or 0, self.allowed)
        return 2 * parameters * dtype.itemsize < free

    def loading(self) -> dict[str, Any]:
        """Options with which transformers loads a model straight to the device, if it can."""
        if self.device.type == "cpu" or find_spec("accelerate") is None:
            return {}
        return {"device_map": {"": self.device}}

    def settle(self) -> None:
        """Have a processor's allocator serve this place."""
        if self.device.type == "cpu":
            keep_freed_memory(not self.streamed)

    def rows(self, length: int, vocab: int) -> int:
        """Sequences of so many tokens whose logits may be alive at a time."""
        return max(1, self.logits_bytes // (4 * length * vocab))

    @contextmanager
    def running(self, packed: int | None = 8) -> Generator[None]:
        """Have products and the allocator serve this place while blocks run.

        Args:
            packed: how many weights a processor keeps in its library's own order; None for all
                (:func:`shearling.engine.products.fast_products`).
        """
        self.settle()
        if self.device.type == "cpu":
            with fast_products(packed):
                yield
            return
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.tf32
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    def announce(self) -> None:
        """Tell what was chosen and why, where somebody wants to know."""
        if self.tell is not None:
            for line in self.reasons:
                self.tell(line)

    def lines(self) -> list[str]:
        """What was chosen and why, for a person."""
        return list(self.reasons)


@dataclass(frozen=True, slots=True)
class Wish:
    """What a user asked of a place.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        stream: read blocks from disk (True), hold the model in memory (False), or as memory
            allows (None).
        memory: bytes of the device that may be used at most; None for what is free.
        ranks: processes that are to share the work.
    """

    device: str = "auto"
    dtype: str = "auto"
    stream: bool | None = None
    memory: int | None = None
    ranks: Ranks = ALONE

    def torch_device(self) -> torch.device:
        """The device; a GPU that is there is taken by ``auto``, its own by each of many ranks."""
        return named_device(self.device) if self.ranks.size == 1 else self.ranks.device

    def torch_dtype(self, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
        """The type that blocks compute in."""
        if self.dtype == "auto":
            large = device.type != "cpu" and checkpoint.parameters >= SMALL
            return torch.bfloat16 if large and has_bfloat16(device) else torch.float32
        types = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        if self.dtype not in types:
            raise ShearlingError(
                f"--dtype {self.dtype} was given, but blocks compute in auto, "
                f"{' or '.join(types)}; give one of these."
            )
        if self.dtype == "bfloat16" and device.type == "cuda":
            require_bfloat16(device)
        return types[self.dtype]


@dataclass(frozen=True, slots=True)
class Need:
    """What a task keeps between two blocks.

    Attributes:
        tokens: of all sequences together.
        values: float32 numbers kept for each token at the same time.
    """

    tokens: int = 0
    values: int = 0

    @property
    def bytes(self) -> int:
        """Of all states together."""
        return 4 * self.tokens * self.values

    def shared(self, ranks: int) -> Need:
        """What each of so many ranks keeps."""
        return replace(self, tokens=-(-self.tokens // ranks))

    def __or__(self, other: Need) -> Need:
        """Whichever keeps more: tasks follow one another."""
        return max(self, other, key=lambda need: need.bytes)


def _agreed_free(device: torch.device, wish: Wish) -> int:
    """Free bytes for each rank, of the one that has least; the processor's are divided."""
    free = free_bytes(str(device)) or 0
    if device.type == "cpu":
        free //= wish.ranks.local
    return int(wish.ranks.least(free))


def _together(ranks: Ranks) -> str:
    return f" {ranks.size} processes share the sequences." if ranks.size > 1 else ""


def _on_cpu(checkpoint: Checkpoint, dtype: torch.dtype, wish: Wish, need: Need) -> Place:
    free = _agreed_free(torch.device("cpu"), wish)
    model = resident_bytes(checkpoint, dtype)
    # As much again is left free for what computes.
    resident = 2 * model < free if wish.stream is None else not wish.stream
    left = free - (2 * model if resident else 0)
    in_memory = need.bytes <= left // 2 if need.bytes else resident
    if wish.stream:
        in_memory = False
    told = f"{gb(free)} of memory are free, the model takes {gb(model)}"
    told += f", its states {gb(need.bytes)}" if need.bytes else ""
    where = "in memory" if resident else "read block by block"
    reasons = [f"cpu, {name_of(dtype)}, weights {where}: {told}.{_together(wish.ranks)}"]
    if wish.memory is not None:
        reasons.append(IDLE_CAP)
    scratch = None
    if not in_memory:
        place: Room = roomiest(need.bytes)
        scratch = place.directory
        reasons.append(f"States wait on disk in {scratch} ({gb(place.free)} free).")
    return Place(
        torch.device("cpu"), dtype, "resident" if resident else "disk",
        "host" if in_memory else "disk", scratch=scratch, ranks=wish.ranks, reasons=tuple(reasons),
    )  # fmt: skip


def _on_gpu(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, wish: Wish, need: Need
) -> Place:
    card = Card.of(device)
    hold_to(device, wish.memory)
    return on_card(
        checkpoint, replace(card, free=int(wish.ranks.least(card.free))), dtype, wish, need
    )


def on_card(
    checkpoint: Checkpoint, card: Card, dtype: torch.dtype, wish: Wish, need: Need
) -> Place:
    """The place on a GPU of which all that matters is known, be it there or not.

    Raises:
        ShearlingError: less memory than one block needs.
    """
    device = card.device
    require_room(checkpoint, dtype, card, wish.memory, whole=wish.stream is False)
    free = capped(card.free, wish.memory)
    demand = Demand.of(checkpoint, dtype)
    resident = demand.whole <= free if wish.stream is None else not wish.stream
    room = free - (demand.whole if resident else demand.streamed)
    model = resident_bytes(checkpoint, dtype)
    host = _agreed_free(torch.device("cpu"), wish)
    weights: Weights = "resident"
    if not resident:
        weights = "pinned" if 1.2 * model < host and wish.stream is None else "disk"
    states: Shelf = "device"
    scratch = None
    if need.bytes > room:
        states = "host"
        held = model if weights == "pinned" else 0
        if need.bytes + 1.2 * held > 0.8 * host:
            states, scratch = "disk", roomiest(need.bytes).directory
    room -= need.bytes if states == "device" else 0
    where = {
        "resident": "on the device", "pinned": "in pinned memory", "disk": "read block by block",
    }  # fmt: skip
    reason = (
        f"{device} ({card.name}), {name_of(dtype)}, weights {where[weights]}, states on the "
        f"{states}: {gb(free)} free or allowed, the model takes {gb(model)}, its states "
        f"{gb(need.bytes)}.{_together(wish.ranks)}"
    )
    return Place(
        device, dtype, weights, states, tokens_in(room, checkpoint, dtype),
        tf32=dtype != torch.float32, spare=max(0, room),
        allowed=wish.memory, scratch=scratch, ranks=wish.ranks, reasons=(reason,),
    )  # fmt: skip


def tokens_in(room: int, checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """How many tokens run at a time where so many bytes are left: a power of two.

    Most is held where a block runs forward and back while its widest activations are watched: of
    each, four of its type and their gradients, and copies of both in float32 for the sums; of the
    stream's width, some fifteen float32.
    """
    shape = checkpoint.shape
    widest = max(shape["hidden"], shape.get("mlp", 0), shape.get("expert_mlp", 0))
    each = widest * (8 * dtype.itemsize + 24) + shape["hidden"] * 60
    fitting = max(room, 0) // each
    return min(GPU_BATCH_TOKENS, max(LEAST_TOKENS, 2 ** (fitting.bit_length() - 1)))


def hold_to(device: torch.device, memory: int | None) -> None:
    """Have torch hold no more of a GPU than ``memory`` bytes; all there are if it is None.

    Else it would hold on to what it no longer uses, as long as the card has more. What a process
    takes of a card besides, ``CONTEXT_BYTES``, is part of what is allowed.
    """
    total = torch.cuda.get_device_properties(device).total_memory
    share = 1.0 if memory is None else max(memory - CONTEXT_BYTES, memory // 2) / total
    torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)


def keep_freed_memory(keep: bool) -> None:
    """Have glibc keep large arrays when they are freed, or give them back to the system at once.

    By default it learns to keep those of up to 32 MB, which serves neither end. Streamed, with
    blocks coming and going, the gaps between them add up: memory grew by 400 MB over 24 blocks of
    220 MB. In memory, every larger array is mapped and cleared anew: a third of a repair's
    processor time (LOG.md, 2026-11-22).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return
    if keep:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never
    else:
        mallopt(_M_MMAP_MAX, 65536)  # glibc's default
        mallopt(_M_TRIM_THRESHOLD, 2**17)  # likewise
        mallopt(_M_MMAP_THRESHOLD, 2**20)
