"""Experts of a block: which tokens reach each one, what they bring, and what it gives.

transformers runs all experts of a block in one module, from one parameter for all of them. Where
somebody has to know more, that module's own pieces are run here, expert by expert.

Shapes: T tokens, D hidden, E experts, P experts that a token is sent to, R tokens that reach an
expert, K neurons of an expert.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shearling.model.checkpoint import Checkpoint
from shearling.table.families.base import ExpertModules


def has_experts(checkpoint: Checkpoint, block: int) -> bool:
    """Whether a block has experts, and is not one of those without in a model of both."""
    return any(row.of_experts for row in checkpoint.layout.block_rows(block))


@dataclass(frozen=True, slots=True)
class Arrivals:
    """The tokens that reach one expert.

    Attributes:
        expert: its number.
        tokens_R: their numbers.
        weights_R: what its output is multiplied by for each of them.
    """

    expert: int
    tokens_R: Tensor
    weights_R: Tensor


@dataclass(slots=True)
class Routing:
    """What a block's router decided on the tokens of one batch.

    Attributes:
        x_TD: what entered the experts.
        weights_TP: of the chosen experts.
        chosen_TP: their numbers.
        shared_TK: what enters the last matrix of the shared expert, times its weight; None
            without one.
        read_TD: what entered the router, where that is not what entered the experts.
    """

    x_TD: Tensor
    weights_TP: Tensor
    chosen_TP: Tensor
    shared_TK: Tensor | None = None
    read_TD: Tensor | None = None

    @property
    def routed_TD(self) -> Tensor:
        """What entered the router."""
        return self.x_TD if self.read_TD is None else self.read_TD

    def rerouted(self, weights_TP: Tensor, chosen_TP: Tensor) -> Routing:
        """The same tokens, sent to other experts; without what enters a shared one."""
        return Routing(self.x_TD, weights_TP, chosen_TP, read_TD=self.read_TD)

    def part(self, rows: slice | Tensor) -> Routing:
        """Of some of the tokens, without what enters a shared expert."""
        read_TD = None if self.read_TD is None else self.read_TD[rows]
        return Routing(
            self.x_TD[rows], self.weights_TP[rows], self.chosen_TP[rows], read_TD=read_TD
        )

    def dense(self, experts: int) -> Tensor:
        """The weight of each of so many experts for every token (T, E), zero if not chosen."""
        weights_TE = self.weights_TP.new_zeros(len(self.chosen_TP), experts, dtype=torch.float32)
        return weights_TE.scatter(1, self.chosen_TP, self.weights_TP.float())

    def loads(self, experts: int) -> Tensor:
        """How many tokens each of so many experts is sent (E), on the host."""
        return torch.bincount(self.chosen_TP.flatten().cpu(), minlength=experts)

    def reached(self, expert: int) -> Arrivals:
        """The tokens that reach an expert."""
        tokens_R, places_R = (self.chosen_TP == expert).nonzero(as_tuple=True)
        return Arrivals(expert, tokens_R, self.weights_TP[tokens_R, places_R])


class Experts:
    """A block's experts, one at a time.

    Args:
        block: its module.
        mixture: where they are in it.
    """

    def __init__(self, block: nn.Module, mixture: ExpertModules) -> None:
        """Find the modules."""
        self.mixture = mixture
        self.router = block.get_submodule(mixture.router)
        self.module: Any = block.get_submodule(mixture.experts)
        self.shared = block.get_submodule(mixture.shared) if mixture.shared else None
        if mixture.handed:
            _hand(self.router, block, mixture.handed)

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.module.down_proj)

    @property
    def rows(self) -> nn.Parameter:
        """The router's matrix (E, D), a row for each expert."""
        return self.router.get_parameter(self.mixture.rows)

    def neurons(self, expert: int, x_RD: Tensor) -> Tensor:
        """What enters an expert's last matrix (R, K)."""
        module = self.module
        joined = _product(x_RD, module.gate_up_proj[expert], transposed=module.is_transposed)
        if module.has_bias:
            joined = joined + module.gate_up_proj_bias[expert]
        return module._apply_gate(joined)

    def written(self, expert: int, a_RK: Tensor) -> Tensor:
        """What an expert gives (R, D) for what enters its last matrix."""
        module = self.module
        out_RD = _product(a_RK, module.down_proj[expert], transposed=module.is_transposed)
        return out_RD + module.down_proj_bias[expert] if module.has_bias else out_RD

    def writer(self, expert: int) -> Tensor:
        """The last matrix of an expert (D, K), a view of what the module computes with."""
        weight = self.module.down_proj[expert]
        return weight.T if self.module.is_transposed else weight


def _hand(router: Any, block: nn.Module, path: str) -> None:
    """Have a router take what its block hands it beside the tokens, whoever runs it."""
    if hasattr(router, "handed"):
        return
    holder, _, name = path.rpartition(".")
    router.handed = partial(block.get_submodule(holder).get_buffer, name)
    router.register_forward_pre_hook(
        lambda router, args: args if len(args) > 1 else (*args, router.handed())
    )


def decided(out: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Weights (T, P) and numbers (T, P) of the experts chosen, of what a router gives.

    Routers give logits, weights and numbers; Granite's gives them the other way round in
    transformers 5.17.
    """
    logits_or_chosen, weights_TP, chosen_or_logits = out
    if logits_or_chosen.is_floating_point():
        return weights_TP, chosen_or_logits
    return weights_TP, logits_or_chosen


def narrowed(
    router: nn.Module, mixture: ExpertModules, kept_E: Tensor, x_TD: Tensor, *handed_E: Tensor
) -> tuple[Tensor, ...]:
    """What a router's own code gives if it knows the experts ``kept_E`` alone.

    Args:
        router: the module.
        kept_E: numbers of the experts.
        x_TD: what enters it.
        handed_E: what its block hands it besides, an entry an expert.

    Returns:
        Logits (T, E) of these, weights (T, P), and the chosen ones' numbers (T, P) among all; in
        the router's own order.
    """
    count = len(router.get_parameter(mixture.rows))
    narrow: Any = _of_some(router, mixture, kept_E, count)
    narrow.num_experts = len(kept_E)
    out: tuple[Tensor, ...] = narrow.forward(x_TD, *(bias_E[kept_E] for bias_E in handed_E))
    _, chosen_TP = decided(out)
    return tuple(kept_E[each] if each is chosen_TP else each for each in out)


def _of_some(module: nn.Module, mixture: ExpertModules, kept_E: Tensor, count: int) -> nn.Module:
    """A router, or a part of it, whose tensors have of ``count`` experts those kept.

    Experts are along the first dimension of their number; tensors in common stay as they are.
    """
    some = copy.copy(module)
    for tensors in ("_parameters", "_buffers"):
        vars(some)[tensors] = {
            name: t
            if t is None or name in mixture.common
            else t.index_select(t.shape.index(count), kept_E)
            for name, t in vars(module)[tensors].items()
        }
    vars(some)["_modules"] = {
        name: part if part is None else _of_some(part, mixture, kept_E, count)
        for name, part in module._modules.items()
    }
    return some


def without(experts: Experts, routing: Routing, expert: int) -> Routing:
    """Where tokens would be sent if there were no such expert.

    A router that picks groups of experts first wants these to be even; there the expert stays, and
    is never chosen.
    """
    router, x_TD = experts.router, routing.routed_TD
    if getattr(router, "num_group", 1) > 1:
        unwanted: Any = copy.copy(router)
        bias_E = router.get_buffer("e_score_correction_bias").clone()
        bias_E[expert] = -torch.inf
        vars(unwanted)["_buffers"] = {**router._buffers, "e_score_correction_bias": bias_E}
        return routing.rerouted(*decided(unwanted.forward(x_TD)))
    kept_E = torch.tensor([e for e in range(experts.count) if e != expert], device=x_TD.device)
    handed: Any = getattr(router, "handed", None)
    biases = [handed()] if handed else []
    return routing.rerouted(*decided(narrowed(router, experts.mixture, kept_E, x_TD, *biases)))


def _product(x: Tensor, weight: Tensor, *, transposed: bool) -> Tensor:
    return x @ weight if transposed else nn.functional.linear(x, weight)


@dataclass(slots=True)
class Heard:
    """What passed a block's router, and its shared expert, piece by piece of a batch."""

    routings: list[tuple[Tensor, ...]] = field(default_factory=list)
    entered: list[Tensor] = field(default_factory=list)
    shared: list[Tensor] = field(default_factory=list)
    gates: list[Tensor] = field(default_factory=list)

    def clear(self, *_: object) -> None:
        """Forget the last batch."""
        for heard in (self.routings, self.entered, self.shared, self.gates):
            heard.clear()

    def note(self, _: nn.Module, args: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> None:
        """A router has decided."""
        self.routings.append((args[0].flatten(0, -2).detach(), *decided(out)))

    def note_entered(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """The experts are reached."""
        self.entered.append(args[0].flatten(0, -2).detach())

    def note_shared(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """The last matrix of the shared expert is reached."""
        self.shared.append(args[0].flatten(0, -2))

    def note_gate(self, _: nn.Module, args: object, out: Tensor) -> None:
        """The shared expert's weight is known."""
        self.gates.append(out.flatten(0, -2).sigmoid())

    def whole(self) -> Routing:
        """All pieces of the batch in one."""
        shared_TK = torch.cat(self.shared) if self.shared else None
        if shared_TK is not None and self.gates:
            shared_TK = shared_TK * torch.cat(self.gates)
        parts = zip(*self.routings, strict=True)
        read_TD, weights_TP, chosen_TP = (torch.cat(tensors) for tensors in parts)
        if not self.entered:
            return Routing(read_TD, weights_TP, chosen_TP, shared_TK)
        return Routing(torch.cat(self.entered), weights_TP, chosen_TP, shared_TK, read_TD)


@contextmanager
def listening(block: nn.Module, mixture: ExpertModules) -> Generator[Callable[[], Routing]]:
    """Note what a block's router decides; gives a function for the batch that ran last."""
    heard = Heard()
    router = block.get_submodule(mixture.router)
    handles = [
        block.register_forward_pre_hook(heard.clear), router.register_forward_hook(heard.note),
    ]  # fmt: skip
    if mixture.beside:  # the router then reads the stream by itself, too
        experts = block.get_submodule(mixture.experts)
        handles.append(experts.register_forward_pre_hook(heard.note_entered))
    if mixture.shared:
        shared = block.get_submodule(mixture.shared)
        handles.append(shared.register_forward_pre_hook(heard.note_shared))
    if mixture.shared_gate:
        gate = block.get_submodule(mixture.shared_gate)
        handles.append(gate.register_forward_hook(heard.note_gate))
    try:
        yield heard.whole
    finally:
        for handle in handles:
            handle.remove()


def every(experts: Experts, routing: Routing) -> Iterator[tuple[Arrivals, Tensor, Tensor]]:
    """Every expert that tokens reach: these, what enters its last matrix, and what it gives."""
    for expert in range(experts.count):
        reached = routing.reached(expert)
        if len(reached.tokens_R):
            a_RK = experts.neurons(expert, routing.x_TD[reached.tokens_R])
            yield reached, a_RK, experts.written(expert, a_RK)
