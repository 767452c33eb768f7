"""Gated weights computed once a step rather than in every micro-batch, on GPUs.

A gated weight costs several passes over its memory forward and more backward, whatever the number
of tokens. Held as leaves for a step, gated weights are used like plain ones; when all
micro-batches have added to their gradients, these are brought to the weights and the gates at once.
With one micro-batch that is the same arithmetic; with several, sums are taken in another order, so
that a CPU, whose figures are to stay, gates every micro-batch's weights anew.

Shapes: O outputs and I inputs of a linear map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Gates = Callable[[], tuple[Tensor | None, Tensor | None]]


@dataclass(frozen=True)
class _Fold:
    """A gated weight (O, I) as a leaf, and what it was made of."""

    leaf: Tensor
    rows: Tensor | None
    columns: Tensor | None


class Folds:
    """The gated weights of a model, for the time of a step."""

    def __init__(self) -> None:
        """None yet."""
        self._modules: list[tuple[Any, Gates]] = []
        self._folds: dict[Any, _Fold] = {}

    def add(self, module: Any, gates: Gates) -> None:
        """Fold the weight of ``module`` from now on.

        Args:
            module: a linear map.
            gates: gives those of its rows (O,) and columns (I,) in use, None where there are none.
        """
        self._modules.append((module, gates))

    def weight(self, module: Any) -> Tensor | None:
        """The gated weight of a module, if there is one for this step."""
        fold = self._folds.get(module)
        return None if fold is None else fold.leaf

    def compute(self) -> None:
        """Compute all gated weights with the gates in use."""
        for module, gates in self._modules:
            rows_O, columns_I = gates()
            if rows_O is None and columns_I is None:
                continue
            with torch.no_grad():
                leaf_OI = gated(module.weight, rows_O, columns_I)
            self._folds[module] = _Fold(leaf_OI.requires_grad_(), rows_O, columns_I)

    def gather(self) -> None:
        """Bring gradients to weights and gates, and drop the gated weights."""
        folds, self._folds = self._folds, {}
        gates: list[Tensor] = []
        gradients: list[Tensor] = []
        with torch.no_grad():
            for module, fold in folds.items():
                found_OI = fold.leaf.grad
                if found_OI is None:
                    continue
                rows_O, columns_I = fold.rows, fold.columns
                product_OI = found_OI * module.weight
                if rows_O is not None:
                    gates.append(rows_O)
                    gradients.append(_along(product_OI, columns_I).to(rows_O))
                if columns_I is not None:
                    gates.append(columns_I)
                    gradients.append(_along(product_OI.t(), rows_O).to(columns_I))
                _add_gradient(module.weight, found_OI, rows_O, columns_I)
        torch.autograd.backward(gates, gradients)

    def drop(self) -> None:
        """Have every use gate its weight anew."""
        self._folds = {}


def gated(weight_OI: Tensor, rows_O: Tensor | None, columns_I: Tensor | None) -> Tensor:
    """A weight times the gates of its columns, then of its rows."""
    if columns_I is not None:
        weight_OI = weight_OI * columns_I.to(weight_OI)
    if rows_O is not None:
        weight_OI = weight_OI * rows_O[:, None].to(weight_OI)
    return weight_OI


def _along(product_OI: Tensor, gates_I: Tensor | None) -> Tensor:
    """Sums over the second dimension, weighted by gates if there are any."""
    return product_OI.sum(1) if gates_I is None else product_OI @ gates_I.to(product_OI)


def _add_gradient(
    weight: Tensor, found_OI: Tensor, rows_O: Tensor | None, columns_I: Tensor | None
) -> None:
    """The weight's own gradient, in the memory of the gated one's, which is not needed any more."""
    if columns_I is not None:
        found_OI.mul_(columns_I.to(found_OI))
    if rows_O is not None:
        found_OI.mul_(rows_O[:, None].to(found_OI))
    weight.grad = found_OI if weight.grad is None else weight.grad.add_(found_OI)
