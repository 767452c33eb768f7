"""A checkpoint whose tensors carry the gates: the full geometry, each unit as strong as its gate.

Cut to the units whose gates are open, it is the gated model; by itself, with channels of the
stream closed, it is not, since stock norms would count the dead channels as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

from torch import Tensor

from shearling.gates.attach import folder
from shearling.gates.bank import GateBank
from shearling.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class Folded(Checkpoint):
    """A checkpoint seen through the gates that a bank holds.

    Attributes:
        bank: of the same checkpoint; its values are those at the time of reading.
    """

    bank: GateBank

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(name, tensor)``, gates multiplied in."""
        fold = folder(self, self.bank)
        for name, tensor in super().read(names):
            yield name, fold(name, tensor)


def through(checkpoint: Checkpoint, bank: GateBank) -> Folded:
    """``checkpoint`` as the gates of ``bank`` make it."""
    own = {field.name: getattr(checkpoint, field.name) for field in fields(Checkpoint)}
    return Folded(**own, bank=bank)
