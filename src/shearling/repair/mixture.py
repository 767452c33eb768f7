"""A repaired block's experts and router, from corrections to tensors of the result and back.

Solutions are of what the block computes with. What is stored has other names, and often more
digits; both are changed here together.

Shapes: D hidden, K neurons of an expert, E surviving experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shearling.engine.experts import Experts, Routing, decided
from shearling.engine.ranks import Ranks
from shearling.engine.stream import BlockStream
from shearling.model.naming import gathered
from shearling.repair.experts import SHARED, Mended, apply
from shearling.repair.merging import Fold, averaged, folds, sample_of
from shearling.table.axes import Row
from shearling.table.families.base import ExpertModules


@dataclass(slots=True)
class MixtureBlock:
    """One block of a cut whose experts are being repaired.

    Attributes:
        stream: the cut.
        target: the block's number in it.
        block: the block itself.
        mixture: where its experts are.
        sums: name in the result -> tensor, of all that has changed, in the digits stored.
    """

    stream: BlockStream
    target: int
    block: nn.Module
    mixture: ExpertModules
    sums: dict[str, Tensor] = field(default_factory=dict)

    @property
    def experts(self) -> Experts:
        """Its experts, as they compute now."""
        return Experts(self.block, self.mixture)

    def change(self, mended: Mended) -> None:
        """Add corrections to experts' last matrices and to the router's rows."""
        experts, view = self.experts, self.stream.checkpoint
        if mended.router_ED is not None:
            self._move_router(mended.router_ED)
        (row,) = (
            row for row in self._rows() if row.role == "linear" and "hidden" in row.output.axes
        )
        if row.stacked:
            self._change_stacked(experts, mended, row.name.format(self.target))
            return
        for expert, change_DK in sorted(mended.corrections.items()):
            name = row.name.format(self.target, expert)
            if expert == SHARED:
                shared = self.mixture.shared
                name = f"{view.family.blocks}.{self.target}.{shared}.weight"
            self.sums[name] = (self._now(name) + change_DK).contiguous()
            apply(experts, expert, self.sums[name])

    def _change_stacked(self, experts: Experts, mended: Mended, name: str) -> None:
        """The same where one tensor holds the matrices of all experts."""
        if not mended.corrections:
            return
        stacked = self._now(name).clone()
        for expert, change_DK in mended.corrections.items():
            transposed = experts.module.is_transposed
            stacked[expert] += change_DK.T if transposed else change_DK
            apply(experts, expert, stacked[expert].T if transposed else stacked[expert])
        self.sums[name] = stacked

    def _move_router(self, change_ED: Tensor) -> None:
        homes = self.stream.checkpoint.block_homes(self.target)
        wanted = f"{self.mixture.router}.{self.mixture.rows}"
        (name,) = (name for name, home in homes.items() if home.parameter == wanted)
        self.sums[name] = (self._now(name) + change_ED).contiguous()
        with torch.no_grad():
            self.experts.rows.copy_(self.sums[name])

    def merge(self, whole: MixtureBlock, kept: Sequence[int], routings: Sequence[Routing],
              ranks: Ranks) -> None:  # fmt: skip
        """Fold the experts that go into those that stay.

        Args:
            whole: the same block before any expert went.
            kept: the numbers there of those that stay.
            routings: what enters the router, batch by batch, of this rank.
            ranks: who share the tokens; the first one decides.
        """
        everyone = whole.experts
        load_E = torch.zeros(everyone.count, dtype=torch.float64)
        for routing in routings:
            before = routing.rerouted(*decided(everyone.router(routing.routed_TD)))
            load_E += before.loads(everyone.count)
        ranks.add(load_E)
        sample_TD = sample_of(torch.cat([r.x_TD for r in routings]), everyone.count)
        # Each rank has a sample of its own, by which others might fold otherwise.
        mine = [(f.expert, f.into, f.partner_K.tolist()) for f in folds(everyone, kept, sample_TD)]
        folded = [
            Fold(expert, into, torch.tensor(partner_K, device=sample_TD.device))
            for expert, into, partner_K in ranks.agreed(mine)
        ]
        for row in self._rows():
            parts = whole._by_expert(row)
            merged = averaged(parts, row, whole.stream.checkpoint.shape, folded, load_E)
            merged = {e: ranks.same(merged[e]) for e in sorted(merged)}
            self._put(row, {kept.index(e): tensor for e, tensor in merged.items()})
        homes = self.stream.checkpoint.block_homes(self.target)
        mine = {name: homes[name] for row in self._rows() for name in self._names(row)}
        tensors = ((name, self._now(name)) for name in mine)
        with torch.no_grad():
            for parameter, values in gathered(tensors, mine).items():
                self.block.get_parameter(parameter).copy_(values)

    def _put(self, row: Row, merged: dict[int, Tensor]) -> None:
        names = self._names(row)
        if not row.stacked:
            self.sums |= {names[e]: tensor.contiguous() for e, tensor in merged.items()}
            return
        stacked = self._now(names[0]).clone()
        for expert, tensor in merged.items():
            stacked[expert] = tensor
        self.sums[names[0]] = stacked

    def _by_expert(self, row: Row) -> dict[int, Tensor]:
        """A row's tensors, one for each expert."""
        names = self._names(row)
        tensors = self._now(names[0]) if row.stacked else map(self._now, names)
        return dict(enumerate(tensors))

    def _rows(self) -> list[Row]:
        rows = self.stream.checkpoint.layout.block_rows(self.target)
        return [row for row in rows if row.of_experts]

    def _names(self, row: Row) -> list[str]:
        return row.names(self.target, self.stream.checkpoint.shape)

    def _now(self, name: str) -> Tensor:
        """A tensor as it is by now (float32)."""
        changed = self.sums.get(name)
        return self.stream.stored(name).float() if changed is None else changed
