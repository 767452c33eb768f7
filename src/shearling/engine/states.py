"""Hidden states between two blocks, in memory or in scratch files.

Shapes: B sequences of a batch, S positions, D hidden.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Key = frozenset[int]


class States:
    """Hidden states by (blocks skipped so far, batch), in memory or in scratch files.

    A model that is streamed because it does not fit keeps its states on disk as well, so that
    memory does not grow with depth.
    """

    def __init__(self, scratch: Path | None) -> None:
        """Keep states in ``scratch``, or in memory if that is None."""
        self._scratch = scratch
        self._held: dict[tuple[Key, int], Tensor | tuple[Path, torch.Size, torch.dtype]] = {}
        self._count = 0

    def put(self, key: Key, batch: int, h_BSD: Tensor) -> None:
        """Store a state, replacing what was there."""
        if self._scratch is None:
            self._held[key, batch] = h_BSD
            return
        self.drop(key, batch)
        file = self._scratch / f"{self._count}.states"
        self._count += 1
        h_BSD.contiguous().view(torch.uint8).numpy().tofile(file)
        self._held[key, batch] = (file, h_BSD.shape, h_BSD.dtype)

    def get(self, key: Key, batch: int) -> Tensor:
        """Fetch a state."""
        held = self._held[key, batch]
        if isinstance(held, Tensor):
            return held
        file, shape, dtype = held
        return torch.from_numpy(np.fromfile(file, dtype=np.uint8)).view(dtype).view(shape)

    def move(self, old: Key, new: Key, batch: int) -> None:
        """Let a state go by another key."""
        self._held[new, batch] = self._held.pop((old, batch))

    def drop(self, key: Key, batch: int) -> None:
        """Forget a state, if there is one."""
        held = self._held.pop((key, batch), None)
        if isinstance(held, tuple):
            held[0].unlink()
