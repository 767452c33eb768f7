"""Numbers of a step on their way from the device, read when they have arrived.

Asking a GPU for a number waits for all that it was told to do; a loop that asks in every step
leaves it idle while the next step is being told. Here the numbers of a step are copied into
page-locked memory behind it, and read while the next one runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class Reading:
    """Scalars (0-dim tensors of one device) by name, in mappings of any depth.

    On a CPU they are there at once, as float64, which holds every float32 exactly.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        """Begin to copy them; the device is not waited for."""
        self._paths, scalars = zip(*_leaves(values, ()), strict=True)
        together = torch.stack([value.detach().to(torch.float64) for value in scalars])
        self._numbers, self._arrived = together, None
        if together.device.type == "cuda":
            self._numbers = together.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        self._empty = [path for path, value in _branches(values, ()) if not value]

    def read(self) -> dict[str, Any]:
        """The numbers, in the mappings that they came in; waits for their step alone."""
        if self._arrived is not None:
            self._arrived.synchronize()
        nested: dict[str, Any] = {}
        for path in self._empty:
            _inside(nested, path)
        for path, number in zip(self._paths, self._numbers.tolist(), strict=True):
            _inside(nested, path[:-1])[path[-1]] = number
        return nested


def _leaves(values: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[Any, Tensor]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _branches(values: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[Any, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield (*path, key), value
            yield from _branches(value, (*path, key))


def _inside(nested: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for key in path:
        nested = nested.setdefault(key, {})
    return nested
