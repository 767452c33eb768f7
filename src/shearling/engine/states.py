"""Hidden states between two blocks, on the shelf that a place says: device, host or disk.

Shapes: B sequences of a batch, S positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from shearling.engine.place import Place
from shearling.files.scratch import new_scratch, remove

Key = Hashable
MAIN: Key = "main"  # the states of a model as it is


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    shape: torch.Size
    dtype: torch.dtype


class States:
    """Tensors by key and batch; a context manager, since those on disk are removed at its end.

    A model that is streamed because it does not fit keeps its states on disk as well, so that
    memory does not grow with depth.
    """

    def __init__(self, place: Place) -> None:
        """Keep states where ``place`` says."""
        self.place = place
        self._scratch = new_scratch(place.scratch) if place.states == "disk" else None
        self._pinned = place.states == "host" and place.device.type == "cuda"
        self._held: dict[tuple[Key, int], Tensor | _File] = {}
        self._count = 0

    def __enter__(self) -> States:
        """Nothing to do: states are kept from the first one on."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        """Forget all, on disk too."""
        self._held.clear()
        if self._scratch is not None:
            remove(self._scratch)

    def put(self, key: Key, batch: int, h_BSD: Tensor) -> None:
        """Store a state, replacing what was there."""
        if self._scratch is not None:
            self._held[key, batch] = self._written(key, batch, h_BSD)
        elif self._pinned:
            self._held[key, batch] = _on_host(h_BSD, self._held.get((key, batch)))
        else:
            self._held[key, batch] = h_BSD

    def get(self, key: Key, batch: int) -> Tensor:
        """Fetch a state, on the device that computes."""
        held = self._held[key, batch]
        if isinstance(held, _File):
            data = torch.from_numpy(np.fromfile(held.path, dtype=np.uint8))
            held = data.view(held.dtype).view(held.shape)
        return held.to(self.place.device, non_blocking=self._pinned)

    def move(self, old: Key, new: Key, batch: int) -> None:
        """Let a state go by another key."""
        self._held[new, batch] = self._held.pop((old, batch))

    def drop(self, key: Key, batch: int) -> None:
        """Forget a state, if there is one."""
        held = self._held.pop((key, batch), None)
        if isinstance(held, _File):
            held.path.unlink()

    def take(self, key: Key, batch: int) -> Tensor:
        """Fetch a state and forget it."""
        h_BSD = self.get(key, batch)
        self.drop(key, batch)
        return h_BSD

    def _written(self, key: Key, batch: int, h_BSD: Tensor) -> _File:
        self.drop(key, batch)
        assert self._scratch is not None
        file = self._scratch / f"{self._count}.states"
        self._count += 1
        h_BSD.detach().cpu().contiguous().view(torch.uint8).numpy().tofile(file)
        return _File(file, h_BSD.shape, h_BSD.dtype)


def _on_host(h_BSD: Tensor, before: Tensor | _File | None) -> Tensor:
    """A copy in pinned memory, in the buffer that the key had if it fits.

    Copies to and fro are queued on one stream of the device, so none overtakes another.
    """
    fits = (
        isinstance(before, Tensor) and before.shape == h_BSD.shape and before.dtype == h_BSD.dtype
    )
    if not fits:
        before = torch.empty(h_BSD.shape, dtype=h_BSD.dtype, pin_memory=True)
    assert isinstance(before, Tensor)
    return before.copy_(h_BSD.detach(), non_blocking=True)
