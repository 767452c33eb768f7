"""Blocks' weights on their way to the device: held there, in pinned memory, or read each time."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from shearling.engine.place import Place
from shearling.model.checkpoint import Checkpoint
from shearling.model.naming import gathered
from shearling.model.tensors import StoredTensors, Tensors


@dataclass(frozen=True, slots=True)
class _Sent:
    """Weights of a block on the device, and the event after which they are complete."""

    weights: Mapping[str, Tensor]
    arrived: torch.cuda.Event


class BlockWeights:
    """The blocks of a model, each loaded when it is asked for.

    On a GPU the next block is read and copied, on a stream of its own, while the present one
    computes; two blocks and what computes are on the device then.
    """

    def __init__(self, checkpoint: Checkpoint, shells: list[nn.Module], place: Place) -> None:
        """Blocks start without weights (on the meta device)."""
        self.checkpoint, self.shells, self.place = checkpoint, shells, place
        self._tensors = moved(checkpoint.tensors, place.device)
        self._held: dict[int, nn.Module] = {}
        self._pinned: dict[int, dict[str, Tensor]] = {}
        self._ahead = place.device.type == "cuda" and place.weights != "resident"
        self._reader = ThreadPoolExecutor(1, "shearling-weights") if self._ahead else None
        self._copying = torch.cuda.Stream(place.device) if self._ahead else None
        self._coming: dict[int, Future[_Sent]] = {}

    @contextmanager
    def ready(self, index: int, then: int | None = None) -> Generator[nn.Module]:
        """Block ``index``; unless all are held, its weights are freed on leaving."""
        if self.place.weights == "resident":
            yield self.held(index)
            return
        block = self._fetch(index)
        if then is not None and self._ahead and then not in self._coming:
            self._send(then)
        try:
            yield block
        finally:
            block.to("meta")

    def held(self, index: int) -> nn.Module:
        """Block ``index``, loaded once and kept."""
        if index not in self._held:
            self._held[index] = self._filled(index, self._read(index, self.place.device))
        return self._held[index]

    def release(self) -> None:
        """Let go of blocks that are held on the device; they are loaded again when asked for."""
        for block in self._held.values():
            block.to("meta")
        self._held.clear()

    def _fetch(self, index: int) -> nn.Module:
        if not self._ahead:
            return self._filled(index, self._read(index, self.place.device))
        if index not in self._coming:
            self._send(index)
        sent = self._coming.pop(index).result()
        computing = torch.cuda.current_stream(self.place.device)
        computing.wait_event(sent.arrived)
        for weight in sent.weights.values():
            weight.record_stream(computing)  # its memory is not given away while it is read
        return self._filled(index, sent.weights)

    def _send(self, index: int) -> None:
        assert self._reader is not None
        self._coming[index] = self._reader.submit(self._copied, index)

    def _copied(self, index: int) -> _Sent:
        """Copy a block to the device; runs in the reader's thread."""
        assert self._copying is not None
        with torch.cuda.device(self.place.device), torch.cuda.stream(self._copying):
            if self.place.weights == "pinned":
                weights = self._in_pinned_memory(index)
                sent = {n: t.to(self.place.device, non_blocking=True) for n, t in weights.items()}
            else:
                sent = self._read(index, self.place.device)
            arrived = torch.cuda.Event()
            arrived.record(self._copying)
        return _Sent(sent, arrived)

    def _in_pinned_memory(self, index: int) -> dict[str, Tensor]:
        if index not in self._pinned:
            weights = self._read(index, torch.device("cpu"))
            self._pinned[index] = {name: tensor.pin_memory() for name, tensor in weights.items()}
        return self._pinned[index]

    def stored(self, name: str) -> Tensor:
        """A tensor in the type that it is stored in, on the device that computes."""
        ((_, tensor),) = self._tensors.read([name])
        return tensor.to(self.place.device)

    def _read(self, index: int, device: torch.device) -> dict[str, Tensor]:
        """Name inside the block -> weight, as the blocks compute with it.

        Copies, so that the mapped file can be let go of: mapped pages count as memory in use.
        """
        homes, dtype = self.checkpoint.block_homes(index), self.place.dtype
        with ordinary_tensors():
            if device.type == "cpu":
                read = self.checkpoint.read(homes)
                return gathered(((name, t.to(dtype, copy=True)) for name, t in read), homes)
            read = self._tensors.read(homes)  # moved as they are stored: often half as much
            return gathered(((name, t.to(device).to(dtype)) for name, t in read), homes)

    def _filled(self, index: int, weights: Mapping[str, Tensor]) -> nn.Module:
        block = self.shells[index]
        with ordinary_tensors():
            block.load_state_dict(weights, strict=True, assign=True)
        assert not any(t.is_meta for t in (*block.parameters(), *block.buffers()))
        return block


@dataclass(frozen=True)
class MovedTensors:
    """Other tensors, moved to a device as they are read; what wraps them then computes there."""

    whole: Tensors
    device: torch.device

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(name, tensor)`` on the device."""
        for name, tensor in self.whole.read(names):
            yield name, tensor.to(self.device)


def moved(tensors: Tensors, device: torch.device) -> Tensors:
    """The same tensors, made from what is stored on ``device`` rather than on the processor."""
    if device.type == "cpu":
        return tensors
    if isinstance(tensors, StoredTensors):
        return MovedTensors(tensors, device)
    inner: Any = tensors
    return replace(inner, whole=moved(inner.whole, device)) if hasattr(inner, "whole") else tensors


@contextmanager
def ordinary_tensors() -> Generator[None]:
    """What is kept between walks serves inference and differentiation alike.

    Tensors made in inference mode could never take part in a backward pass.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield
