"""What a model hands its blocks besides the state, noted once for a batch's shape.

Shapes: B sequences of a batch, S positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True)
class Call:
    """Masks, positions, rotary tables, as the model hands them to a block.

    Attributes:
        args, kwargs: behind the state.
        dtype: what the block computes in; None for that of the state.
        index: the block's number.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: torch.dtype | None = None
    index: int = 0

    def __call__(self, block: nn.Module, h_BSD: Tensor) -> Tensor:
        """Run ``block`` on a state of the batch shape this call was recorded with."""
        return block(h_BSD.to(self.dtype or h_BSD.dtype), *self.args, **self.kwargs)


def cast(calls: Sequence[Call], dtype: torch.dtype) -> list[Call]:
    """The same for blocks that compute in ``dtype``; tables that blocks share stay shared."""
    converted: dict[int, Tensor] = {}

    def convert(table: Tensor) -> Tensor:
        if not table.is_floating_point():
            return table
        return converted.setdefault(id(table), table.to(dtype))

    def converted_call(call: Call) -> Call:
        args, kwargs = tree_map_only(Tensor, convert, (call.args, call.kwargs))
        return Call(args, kwargs, dtype, call.index)

    return [converted_call(call) for call in calls]
