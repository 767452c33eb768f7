"""The gates of a model: one number for every unit of every axis that is to shrink.

Gates lie in rows among which sizes have to be equal: a block's neurons are a row, the channels of
the stream are one, and so are the query heads of one key/value group where fewer of them are to
stay in each. Within a row the highest gates win.

Shapes: R rows of U units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shearling.errors import ShearlingError
from shearling.gates import hard_concrete
from shearling.gates.folds import Folds
from shearling.table.axes import Axis, Dim
from shearling.table.layout import Layout
from shearling.table.values import Indices, Keep, Shape

OPEN = 5.0  # log alpha of a gate that nothing speaks against (Sheared LLaMA's code)


@dataclass(frozen=True, slots=True)
class Rows:
    """How the units of one axis are laid out.

    Attributes:
        axis: name.
        rows, units: how many, and how many in each.
        target: how many of a row are to stay.
        per_block: whether rows belong to blocks (equally many to each), or to the whole model.
    """

    axis: str
    rows: int
    units: int
    target: int
    per_block: bool


def lay_out(layout: Layout, before: Shape, after: Shape) -> tuple[Rows, ...]:
    """The rows of gates that lead from one shape to another; none for axes that stay.

    The vocabulary has no gates: which tokens stay follows from how often they are used.
    """
    rows = []
    for axis in layout.axes:
        name = axis.name
        if axis.rigid or name == "vocab" or after[name] == before[name]:
            continue
        blocks = before["layers"] if axis.per_block else 1
        groups, units, target = 1, before[name], after[name]
        if axis.inside:
            groups = before[axis.inside]
            units, target = units // groups, target // after[axis.inside]
        if target < units:
            rows.append(Rows(name, blocks * groups, units, target, axis.per_block))
    return tuple(rows)


class GateBank(nn.Module):
    """Parameters of all gates, and the values that the model computes with at the moment.

    Args:
        layout: the table.
        before: sizes of the model.
        after: sizes that are to stay.

    Attributes:
        log_alpha: axis -> parameters (R, U).
        values: axis -> gates (R, U) in use; open where nothing was set.
        live: 1 for channels of the stream whose gate is open, 0 else (D,); None without such gates.
        widening: square root of all channels over the live ones (0-dim).
        folds: gated weights that are computed once a step; None where each use computes them.

    Raises:
        ShearlingError: no axis shrinks.
    """

    def __init__(self, layout: Layout, before: Shape, after: Shape) -> None:
        """Make all gates, open."""
        super().__init__()
        self.layout, self.shape = layout, before
        self.rows = {rows.axis: rows for rows in lay_out(layout, before, after)}
        if not self.rows:
            raise ShearlingError(
                f"the shape asked for is the model's own ({before}), so that there is nothing to "
                "learn; give a smaller one."
            )
        self.log_alpha = nn.ParameterDict(
            {axis: torch.full((rows.rows, rows.units), OPEN) for axis, rows in self.rows.items()}
        )
        self.values: dict[str, Tensor] = {}
        self._blocks: dict[str, tuple[Tensor, ...]] = {}
        self.live: Tensor | None = None
        self.widening: Tensor | None = None
        self.folds: Folds | None = None
        self.set({axis: torch.ones_like(a) for axis, a in self.log_alpha.items()})

    def set(self, values: Mapping[str, Tensor]) -> None:
        """Have the model compute with these gates: axis -> (R, U)."""
        self.values = dict(values)
        self._blocks = {axis: self._by_block(axis, z_RU) for axis, z_RU in self.values.items()}
        hidden = self.values.get("hidden")
        self.live = None if hidden is None else (hidden.detach()[0] > 0).to(hidden.dtype)
        self.widening = None
        if self.live is not None:  # once, not in every norm
            self.widening = (self.live.numel() / self.live.sum()).sqrt()
        if self.folds is not None:
            self.folds.drop()

    def fold(self) -> None:
        """Have gated weights computed once, for all micro-batches of a step, where that is so."""
        if self.folds is not None:
            self.folds.compute()

    def gather(self) -> None:
        """Bring the gradients of weights computed once to the weights and to the gates in use."""
        if self.folds is not None:
            self.folds.gather()

    def of(self, axis: str, block: int | None) -> Tensor | None:
        """The gates (units,) of an axis in one block, those of the units around them included.

        For ``layers`` that is the block's own gate (1,).
        """
        if axis == "layers":
            gates = self._blocks.get(axis)
            return None if gates is None or block is None else gates[0][block : block + 1]
        known = self.layout.axis[axis]
        own = self._own(known, block)
        if known.inside is None:
            return own
        outer = self.of(known.inside, block)
        if outer is None:
            return own
        around = outer.repeat_interleave(self.shape[axis] // self.shape[known.inside])
        return around if own is None else own * around

    def along(self, dim: Dim, block: int | None) -> Tensor | None:
        """The gates along one dimension of a tensor (size of the dimension,), or None if none."""
        gates = {axis: self.of(axis, block) for axis in dim.axes}
        some = next((gate for gate in gates.values() if gate is not None), None)
        if some is None:
            return None
        if len(dim.segments) == len(dim.segments[0]) == 1:  # one axis and nothing else
            return some
        segments = []
        for segment in dim.segments:
            inner = some.new_ones(1)
            for factor in segment:
                gate = gates[factor] if isinstance(factor, str) else None
                size = self.shape[factor] if isinstance(factor, str) else factor
                gate = some.new_ones(size) if gate is None else gate
                inner = (inner[:, None] * gate).flatten()
            segments.append(inner)
        return torch.cat(segments)

    def expected(self) -> dict[str, Tensor]:
        """Axis -> how many of each row (R,) are open, on average; differentiable."""
        return {
            axis: hard_concrete.open_probability(a).sum(1) for axis, a in self.log_alpha.items()
        }

    def settled(self, counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gates (R, U) without chance: axis -> the highest ``counts`` (R,) of each row, rest 0."""
        return {
            axis: hard_concrete.settled(a) * top(a, counts[axis])
            for axis, a in self.log_alpha.items()
        }

    def targets(self) -> dict[str, Tensor]:
        """Axis -> how many of each row (R,) are to stay."""
        return {
            axis: torch.full((rows.rows,), rows.target, device=self.log_alpha[axis].device)
            for axis, rows in self.rows.items()
        }

    def keep(self) -> Keep:
        """The units with the highest gates, exactly as many as are to stay, ties to the lower."""
        masks = {
            axis: top(self.log_alpha[axis].detach(), count)
            for axis, count in self.targets().items()
        }
        model = {axis: _indices(masks[axis][0]) for axis, r in self.rows.items() if not r.per_block}
        layers = model.get("layers", tuple(range(self.shape["layers"])))
        blocks = {
            axis: self._in_blocks(masks, self.layout.axis[axis], layers)
            for axis, r in self.rows.items()
            if r.per_block
        }
        return self.layout.complete(Keep(model, blocks), self.shape)

    def _in_blocks(
        self, masks: Mapping[str, Tensor], axis: Axis, layers: Indices
    ) -> tuple[Indices, ...]:
        depth = self.shape["layers"]
        mask = masks[axis.name].reshape(depth, -1)
        if axis.inside is not None and axis.inside in masks:
            each = self.shape[axis.name] // self.shape[axis.inside]
            mask = mask * masks[axis.inside].repeat_interleave(each, dim=1)
        return tuple(_indices(mask[layer]) for layer in layers)

    def _by_block(self, axis: str, values_RU: Tensor) -> tuple[Tensor, ...]:
        """The gates of each block, one after the other, or those of the model alone.

        Taken apart once: the gradient of a part by itself would fill as much memory as all.
        """
        if not self.rows[axis].per_block:
            return (values_RU[0],)
        return values_RU.reshape(self.shape["layers"], -1).unbind(0)

    def _own(self, axis: Axis, block: int | None) -> Tensor | None:
        values = self._blocks.get(axis.name)
        if values is None:
            return None
        if not axis.per_block:
            return values[0]
        assert block is not None, f"{axis.name} has gates in blocks alone"
        return values[block]


def top(scores_RU: Tensor, count_R: Tensor) -> Tensor:
    """1 for the highest of each row, as many as ``count_R`` says, 0 else; ties to the lower."""
    return (ranks(scores_RU) < count_R[:, None]).to(scores_RU.dtype)


def ranks(scores_RU: Tensor) -> Tensor:
    """Each unit's place in its row, 0 for the highest; ties to the lower index."""
    order_RU = scores_RU.argsort(dim=1, descending=True, stable=True)
    rank_U = torch.arange(scores_RU.shape[1], device=order_RU.device)
    return torch.empty_like(order_RU).scatter_(1, order_RU, rank_U.expand_as(order_RU))


def _indices(mask_U: Tensor) -> Indices:
    return tuple(mask_U.nonzero().flatten().tolist())
