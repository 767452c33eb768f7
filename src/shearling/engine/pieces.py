"""A batch that does not fit in memory is run in halves; those who watch a block see it whole.

Sequences of a batch do not know of one another, so that halves give what the whole gives, but for
the order in which products are summed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor

from shearling.engine.place import Place
from shearling.errors import ShearlingError

Result = TypeVar("Result")
_number: ContextVar[int] = ContextVar("piece of a batch", default=0)


def piece() -> int:
    """The number of the piece that is being run, from 0."""
    return _number.get()


class Pieced:
    """Tensors by name that hooks noted, put together where a batch ran in pieces."""

    def __init__(self) -> None:
        """Nothing noted."""
        self._parts: dict[str, list[Tensor]] = {}

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        """Note the present piece's tensor; what a run that failed noted is replaced."""
        self._parts.setdefault(name, [])[piece() :] = [tensor]

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of the whole batch."""
        return together(self._parts[name])


def together(parts: list[Tensor]) -> Tensor:
    """Pieces of a batch, one behind the other."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Pieces:
    """How many sequences run at a time: as many as there are, until that was once too much."""

    def __init__(self, place: Place) -> None:
        """Nothing was too much so far."""
        self.place = place
        self.rows: int | None = None

    def run(self, function: Callable[..., Result], *tensors: Tensor) -> list[Result]:
        """Call ``function`` on all rows of some tensors, or on fewer at a time, in order.

        Raises:
            ShearlingError: one row alone is too much.
        """
        count, start = len(tensors[0]), 0
        results: list[Result] = []
        while start < count:
            rows = min(self.rows or count, count - start)
            parts = tensors
            if rows < count:
                parts = tuple(tensor[start : start + rows] for tensor in tensors)
            attempt = self._attempt(function, parts, len(results))
            if attempt:
                results += attempt
                start += rows
            else:
                self._halve(rows, tensors[0])
        return results

    def _attempt(
        self, function: Callable[..., Result], parts: tuple[Tensor, ...], number: int
    ) -> list[Result]:
        """The result, or none if memory did not suffice."""
        token = _number.set(number)
        try:
            return [function(*parts)]
        except torch.OutOfMemoryError:
            return []
        finally:
            _number.reset(token)

    def _halve(self, rows: int, tensor: Tensor) -> None:
        """Take half as many from now on; what the attempt that failed held is free by now."""
        device = self.place.device
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if rows == 1:
            raise ShearlingError(
                f"{device} has too little memory left for one sequence of {tensor.shape[1]} "
                "tokens; give --memory with less than there is, or --stream, or a smaller --length."
            )
        self.rows = rows // 2
        if self.place.tell is not None:
            self.place.tell(
                f"{device} ran out of memory with {rows} sequences at a time; the step is repeated "
                f"with {self.rows}."
            )
