"""Tensors that carry the gates: the full geometry, each unit as strong as its gate.

Cut to the units whose gates are open, such a checkpoint is the gated model; by itself, with
channels of the stream closed, it is not, since stock norms would count the dead channels as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from shearling.gates.attach import folder
from shearling.gates.bank import GateBank
from shearling.model.checkpoint import Checkpoint
from shearling.model.tensors import Tensors


@dataclass(frozen=True)
class FoldedTensors:
    """Other tensors with gates multiplied in.

    Attributes:
        plain: what is gated.
        fold: name and values of a tensor -> its values, gated.
    """

    plain: Tensors
    fold: Callable[[str, Tensor], Tensor]

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(name, tensor)``, by the gates in use at the time of reading."""
        for name, tensor in self.plain.read(names):
            yield name, self.fold(name, tensor)


def through(checkpoint: Checkpoint, bank: GateBank) -> Checkpoint:
    """``checkpoint`` as the gates of ``bank`` make it, with the values that they have when read."""
    tensors = FoldedTensors(checkpoint.tensors, folder(checkpoint, bank))
    return replace(checkpoint, tensors=tensors, source=checkpoint)
