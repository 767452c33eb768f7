"""Gates put into a live stock model, and folded into the tensors of a checkpoint.

A gate multiplies weights where its unit writes: a neuron or a head in its column of the matrix
that ends its half of a block, a channel of the stream in everything that writes it, a block in
what it adds to the stream. Which tensors those are follows from the table: linear maps and
look-ups whose output lies on ``hidden``, each dimension of them by the gates of its axes. The
folded tensor is the live product itself, so that the folded model is the gated one.

Forward functions of modules are replaced, rather than hooks added, which torch.compile would
drop, and rather than parametrisations, which would give every weight another name. Look-ups, and
heads tied to them, are gated behind the look-up and before the product, which is the same product
of numbers without a copy of the whole table.

Shapes: B sequences, S positions, D hidden, O outputs and I inputs of a linear map.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shearling.engine.branches import branches
from shearling.errors import ShearlingError
from shearling.gates.bank import GateBank
from shearling.gates.folds import Folds, gated
from shearling.model.checkpoint import Checkpoint
from shearling.table.axes import Row

STREAM = "hidden"


def attach(checkpoint: Checkpoint, model: nn.Module, bank: GateBank, *, once: bool = False) -> None:
    """Have a stock model compute with the gates that ``bank`` holds at the time of each call.

    Weights keep their names and values. Before sharding, since forward functions are replaced.

    Args:
        checkpoint: what the model is of.
        model: stock, changed in place.
        bank: of the same checkpoint.
        once: compute gated weights once a step, and norms over live channels in as few passes as
            stock ones, for GPUs: the same values, rounded otherwise. Not for sharded models.

    Raises:
        ShearlingError: blocks are to go from a model whose blocks cannot be faded out.
    """
    check(checkpoint, bank)
    inside = _Gated(checkpoint, bank)
    bank.folds = Folds() if once else None
    renamed = checkpoint.family.renamed
    for name, (row, block) in checkpoint.layout.places(checkpoint.shape).items():
        module = model.get_submodule(renamed.get(name, name).rpartition(".")[0])
        if inside.writes(row) and row.role == "linear":
            module.forward = _linear(module, inside, row, block)
        elif inside.writes(row) and row.role == "embedding":
            module.forward = _look_up(module, inside, row)
        elif normalises(row):
            module.forward = _norm(module, inside, row, block, short=once)
    head = _tied_head(checkpoint)
    if head is not None and inside.along(head, 1, None) is not None:
        # What runs the blocks: OPT's head reads that, past what transformers calls its base model.
        inner: Any = model.get_submodule(checkpoint.family.blocks.rpartition(".")[0])
        inner.forward = _before_head(inner, inside, head)


def check(checkpoint: Checkpoint, bank: GateBank) -> None:
    """Raise ShearlingError if the gates cannot be put into such a model."""
    if "layers" in bank.rows and not checkpoint.family.additive(checkpoint.config):
        raise ShearlingError(
            f"{checkpoint.name} norms the stream after each half of a block, so that a block "
            "cannot be faded out by what it adds; learn widths alone, and remove blocks with "
            "`shearling prune`."
        )
    shared = [row for row in checkpoint.layout.rows if row.role == "norm"]
    for axis in bank.rows:
        if axis != STREAM and any(axis in row.output.axes for row in shared):
            raise ShearlingError(
                f"{checkpoint.name} norms all {axis} of a block together, so that none can be "
                f"faded out by its gate alone; learn other axes, and cut {axis} with "
                "`shearling prune`."
            )


def folder(checkpoint: Checkpoint, bank: GateBank) -> Callable[[str, Tensor], Tensor]:
    """A function of a tensor's name and values that multiplies the gates in use into them."""
    inside, places = _Gated(checkpoint, bank), checkpoint.layout.places(checkpoint.shape)
    offset = checkpoint.family.gain_offset

    def fold(name: str, tensor: Tensor) -> Tensor:
        row, block = places[name]
        if inside.writes(row):
            for dim in range(tensor.ndim):
                gates = inside.along(row, dim, block)
                if gates is not None:
                    sizes = [-1 if each == dim else 1 for each in range(tensor.ndim)]
                    tensor = tensor * gates.view(sizes).to(tensor)
            layer = inside.layer(row, block)
            return tensor if layer is None else tensor * layer.to(tensor)
        if normalises(row) and inside.ends_branch(row):
            layer = bank.of("layers", block)
            return tensor if layer is None else (tensor + offset) * layer.to(tensor) - offset
        return tensor

    return fold


def normalises(row: Row) -> bool:
    """Whether a row is a norm over the stream."""
    return row.role == "norm" and STREAM in row.output.axes


class _Gated:
    """What the table and a bank say of a tensor."""

    def __init__(self, checkpoint: Checkpoint, bank: GateBank) -> None:
        self.bank, self.gain_offset = bank, checkpoint.family.gain_offset
        prefix = f"{checkpoint.family.blocks}.{{}}."
        self.norms = {f"{prefix}{half.norm}" for half in branches(checkpoint) if half.norm}
        self.normed = bool(self.norms)
        self.centred = checkpoint.family.centred
        self._norm_paths = {
            row.name.rpartition(".")[0] for row in checkpoint.layout.rows if row.role == "norm"
        }

    def writes(self, row: Row) -> bool:
        """Whether a tensor writes into the stream: a norm's shift, which does not, is no such."""
        path = row.name.rpartition(".")[0]
        return (
            row.role in ("linear", "bias", "embedding")
            and STREAM in row.output.axes
            and path not in self._norm_paths
        )

    def ends_branch(self, row: Row) -> bool:
        """Whether a norm stands between a half of a block and the stream."""
        return row.name.rpartition(".")[0] in self.norms

    def along(self, row: Row, dim: int, block: int | None) -> Tensor | None:
        """Gates along one dimension, the tokens' and positions' aside, which are never gated."""
        return self.bank.along(row.dims[dim], block)

    def layer(self, row: Row, block: int | None) -> Tensor | None:
        """The block's own gate, where this tensor is what adds the block's work to the stream."""
        if not row.in_block or self.normed:  # behind a norm it would be normed away
            return None
        return self.bank.of("layers", block)


def _tied_head(checkpoint: Checkpoint) -> Row | None:
    heads = [row for row in checkpoint.layout.rows if row.role == "head" and row.tied_to]
    return heads[0] if heads else None


def _linear(module: Any, inside: _Gated, row: Row, block: int | None) -> Callable[[Tensor], Tensor]:
    def rows() -> Tensor | None:
        return _product(inside.along(row, 0, block), inside.layer(row, block))

    def gates() -> tuple[Tensor | None, Tensor | None]:
        return rows(), inside.along(row, 1, block)

    folds = inside.bank.folds
    if folds is not None:
        folds.add(module, gates)

    def forward(x: Tensor) -> Tensor:
        weight_OI, bias_O = None if folds is None else folds.weight(module), module.bias
        rows_O = rows() if weight_OI is None or bias_O is not None else None
        if weight_OI is None:
            weight_OI = gated(module.weight, rows_O, inside.along(row, 1, block))
        if bias_O is not None and rows_O is not None:
            bias_O = bias_O * rows_O.to(bias_O)
        return nn.functional.linear(x, weight_OI, bias_O)

    return forward


def _look_up(module: Any, inside: _Gated, row: Row) -> Callable[..., Tensor]:
    stock = module.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        found_BSD = stock(*args, **kwargs)
        gates_D = inside.along(row, 1, None)
        return found_BSD if gates_D is None else found_BSD * gates_D.to(found_BSD)

    return forward


def _before_head(inner: Any, inside: _Gated, head: Row) -> Callable[..., Any]:
    stock = inner.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        outputs = stock(*args, **kwargs)
        gates_D = inside.along(head, 1, None)
        assert gates_D is not None
        outputs.last_hidden_state = outputs.last_hidden_state * gates_D.to(
            outputs.last_hidden_state
        )
        return outputs

    return forward


def _norm(
    module: Any, inside: _Gated, row: Row, block: int | None, *, short: bool
) -> Callable[[Tensor], Tensor]:
    """A norm's forward over live channels alone, times the block's gate where it ends a half."""
    stock, bank = module.forward, inside.bank
    ends = inside.ends_branch(row)
    over: Callable[[Tensor], Tensor]
    if isinstance(module, nn.LayerNorm) or inside.centred:
        over = partial(_live_layer_norm, module, bank)
    elif short:
        over = partial(_short_rms_norm, module, bank, inside.gain_offset)
    else:
        over = partial(_live_rms_norm, stock, bank)

    def forward(h_BSD: Tensor) -> Tensor:
        normed = stock(h_BSD) if bank.live is None else over(h_BSD)
        layer = bank.of("layers", block) if ends else None
        return normed if layer is None else normed * layer.to(normed)

    return forward


def _live_rms_norm(stock: Callable[[Tensor], Tensor], bank: GateBank, h_BSD: Tensor) -> Tensor:
    """RMSNorm whose mean is over live channels; dead ones are zero, and only their number counts.

    With s = sqrt(D / live), norm(s h) / s has the mean, and the epsilon, of the narrow norm.
    """
    assert bank.widening is not None
    s = bank.widening.to(h_BSD)
    return stock(h_BSD * s) / s


def _short_rms_norm(module: Any, bank: GateBank, offset: float, h_BSD: Tensor) -> Tensor:
    """The same with s at the mean of squares, (B, S, 1), so that no pass over the states is added.

    The gain is the weight and, in some families, 1; stock norms differ in where they round.
    """
    assert bank.widening is not None
    x_BSD = h_BSD.float() if h_BSD.dtype.itemsize < 4 else h_BSD
    mean_BS1 = x_BSD.square().mean(-1, keepdim=True) * bank.widening.to(x_BSD).square()
    gain_D = module.weight + offset if offset else module.weight
    return ((x_BSD * torch.rsqrt(mean_BS1 + _epsilon(module))) * gain_D).to(h_BSD.dtype)


def _epsilon(module: Any) -> float:
    """What a stock norm adds to a mean square."""
    epsilon = getattr(module, "variance_epsilon", None)
    return module.eps if epsilon is None else epsilon


def _live_layer_norm(module: Any, bank: GateBank, h_BSD: Tensor) -> Tensor:
    """LayerNorm over live channels; its shift would bring the dead ones back to life."""
    assert bank.live is not None
    live_D = bank.live.to(h_BSD)
    count = live_D.sum()
    centred_BSD = (h_BSD - h_BSD.sum(-1, keepdim=True) / count) * live_D
    variance_BS1 = centred_BSD.square().sum(-1, keepdim=True) / count
    found_BSD = centred_BSD * torch.rsqrt(variance_BS1 + _epsilon(module))
    if module.weight is not None:
        found_BSD = found_BSD * module.weight
    bias_D = getattr(module, "bias", None)
    return found_BSD if bias_D is None else found_BSD + bias_D * live_D


def _product(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return left if right is None else right
    return left * right
