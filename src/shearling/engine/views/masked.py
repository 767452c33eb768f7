"""The source model with the units that a Keep removes masked, and nothing else changed.

What a cut must compute, got without cutting: weights keep the source's geometry, and removed
units are silenced where they write. A removed neuron or head has its column of the matrix that
writes into the residual stream set to zero; a removed channel is never written to by anything,
and norms, whether over the stream or over all heads, take their statistics over what survives;
logits are those of the kept tokens; removed blocks are skipped. Readers keep all their weights.

Shapes: B sequences of a batch, S positions, D hidden of the source, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from shearling.engine.experts import has_experts, narrowed
from shearling.engine.place import Place
from shearling.engine.stream import BlockStream
from shearling.engine.views.selected import put_back, silenced
from shearling.engine.walk import logits_of
from shearling.model.checkpoint import Checkpoint
from shearling.model.tensors import Tensors
from shearling.table.axes import EXPERTS, Row
from shearling.table.families import Family
from shearling.table.families.base import ExpertModules
from shearling.table.values import Cut, Indices, Keep, Selection

STREAM = "hidden"


@torch.inference_mode()
def masked_logits(
    checkpoint: Checkpoint,
    keep: Keep | Cut,
    ids_BS: Tensor,
    *,
    replaced: Mapping[str, Tensor] | None = None,
    place: Place | None = None,
) -> Tensor:
    """Logits of the source with what ``keep`` removes masked.

    Args:
        checkpoint: the source; none of the cut's weights are used but ``replaced``.
        keep: what survives.
        ids_BS: tokens, in the source's numbering; only kept ones make sense.
        replaced: tensors of the result that are no cuts of the source's, by their name and in
            their shape there; they are put back into the source's geometry, zeros elsewhere.
        place: where it runs; the processor, block by block, if not given.

    Returns:
        Logits (B, S, V), V being the kept tokens, in order.

    Raises:
        ShearlingError: ``keep`` is not possible.
    """
    cut = checkpoint.layout.cut(keep, checkpoint.shape)
    of_blocks = (checkpoint.layout.block_tensors(b, checkpoint.shape) for b in cut.layers)
    unrouted = frozenset(n for names in of_blocks for n in names if n not in cut.by_source)
    tensors = MaskedTensors(checkpoint.tensors, cut, checkpoint.family, replaced or {}, unrouted)
    masked = replace(checkpoint, tensors=tensors, source=checkpoint)
    stream = _MaskedStream(masked, cut, place or Place.cpu(streamed=True))
    logits_BSV = logits_of(stream, ids_BS, cut.layers)
    vocab = cut.keep.model.get("vocab")
    return logits_BSV if vocab is None else logits_BSV[..., list(vocab)]


@dataclass(frozen=True)
class MaskedTensors:
    """Other tensors in their own geometry, what a cut removes of them silenced.

    Those of removed blocks cannot be read.

    Attributes:
        whole: what is masked.
        cut: what survives of it.
        family: of the model that is masked; it says what is rescaled.
        replaced: target tensor name -> tensor of the result.
        unrouted: names of the tensors of removed experts, to which the router sends nothing.
    """

    whole: Tensors
    cut: Cut
    family: Family
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    unrouted: frozenset[str] = frozenset()

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(name, tensor)`` in the source's geometry, removed units silenced."""
        for name, tensor in self.whole.read(names):
            if name in self.unrouted:
                yield name, tensor
                continue
            selection = self.cut.by_source[name]
            tensor = self._restored(selection, tensor)
            writes = STREAM in selection.row.output.axes
            yield name, silenced(tensor, selection) if writes else tensor

    def _restored(self, selection: Selection, tensor: Tensor) -> Tensor:
        """The source's tensor, or what stands in its place, as the source would hold it."""
        rescale = self.family.rescale(selection.row, self.cut.before, self.cut.after)
        if selection.target in self.replaced:
            source_tensor = self.replaced[selection.target].to(tensor.device)
            source_tensor = source_tensor if rescale is None else rescale.undo(source_tensor)
            return put_back(source_tensor, selection, tuple(tensor.shape))
        # The result holds rescaled values rounded; the rounding is no fault of the surgery.
        return tensor if rescale is None else rescale.undo(rescale.apply(tensor))


class _MaskedStream(BlockStream):
    """A masked model run block by block, norms and routers over survivors alone."""

    def __init__(self, checkpoint: Checkpoint, cut: Cut, place: Place) -> None:
        super().__init__(checkpoint, place)
        for norm, kept in self._norms(cut):
            _narrow(norm, kept)
        mixture = checkpoint.family.mixture
        for block, experts in zip(cut.layers, cut.keep.blocks.get(EXPERTS, ()), strict=False):
            if mixture is not None and has_experts(checkpoint, block):
                _narrow_router(self.shells[block], mixture, experts)

    def _norms(self, cut: Cut) -> Iterator[tuple[nn.Module, Indices]]:
        """Every norm that loses something, parameters or none, and what survives of its input."""
        layout = self.checkpoint.layout
        for row in layout.rows:
            if row.role != "norm":
                continue
            path = row.name.rpartition(".")[0]
            if not row.in_block:
                yield from _narrowed(self._model.get_submodule(path), row, cut, None)
                continue
            inside = path.removeprefix(f"{self.checkpoint.family.blocks}.{{}}.")
            for target, source in enumerate(cut.layers):
                if row.kind is not None and row.kind != layout.kinds[source]:
                    continue
                yield from _narrowed(self.shells[source].get_submodule(inside), row, cut, target)


def _narrowed(
    norm: nn.Module, row: Row, cut: Cut, target: int | None
) -> Iterator[tuple[nn.Module, Indices]]:
    kept = cut.of(target)
    indices = row.output.select(kept, cut.before)
    if indices is not None:
        yield norm, indices


def _narrow(norm: nn.Module, kept: Indices) -> None:
    """Have a norm run its own code on the channels ``kept`` alone, and write zeros elsewhere."""
    kept_E = torch.tensor(kept)

    def over_kept(norm: nn.Module, args: tuple[Any, ...], _: Tensor) -> Tensor:
        (h_BSD,) = args
        alive = kept_E.to(h_BSD.device)
        narrow = copy.copy(norm)
        vars(narrow)["_parameters"] = {
            name: weight if weight is None else weight[alive]
            for name, weight in norm._parameters.items()
        }
        if isinstance(narrow, nn.LayerNorm):
            narrow.normalized_shape = (len(kept),)
        normed = narrow.forward(h_BSD[..., alive])
        return torch.zeros_like(h_BSD).index_copy(-1, alive, normed)

    norm.register_forward_hook(over_kept)


def _narrow_router(block: nn.Module, mixture: ExpertModules, kept: Indices) -> None:
    """Have a router run its own code on the experts ``kept`` alone; their numbers stay."""
    kept_E = torch.tensor(kept)

    def over_kept(router: nn.Module, args: tuple[Tensor, ...], _: object) -> tuple[Tensor, ...]:
        return narrowed(router, mixture, kept_E.to(args[0].device), *args)

    block.get_submodule(mixture.router).register_forward_hook(over_kept)
