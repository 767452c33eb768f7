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
from typing import Any

import torch
from torch import Tensor, nn

from shearling.model.checkpoint import Checkpoint
from shearling.table.families.base import Mixture


def has_experts(checkpoint: Checkpoint, block: int) -> bool:
    """Whether a block has experts, and is not one of those without in a model of both."""
    return any(row.in_expert for row in checkpoint.layout.block_rows(block))


@dataclass(frozen=True, slots=True)
class Reached:
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
        x_TD: what entered the router and the experts.
        logits_TE: the router's logits.
        weights_TP: of the chosen experts.
        chosen_TP: their numbers.
    """

    x_TD: Tensor
    logits_TE: Tensor
    weights_TP: Tensor
    chosen_TP: Tensor

    def reached(self, expert: int) -> Reached:
        """The tokens that reach an expert."""
        tokens_R, places_R = (self.chosen_TP == expert).nonzero(as_tuple=True)
        return Reached(expert, tokens_R, self.weights_TP[tokens_R, places_R])


class Experts:
    """A block's experts, one at a time.

    Args:
        block: its module.
        mixture: where they are in it.
    """

    def __init__(self, block: nn.Module, mixture: Mixture) -> None:
        """Find the modules."""
        self.router = block.get_submodule(mixture.router)
        self.module: Any = block.get_submodule(mixture.experts)

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.module.down_proj)

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


def narrowed(router: nn.Module, kept_E: Tensor, *args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a router's own code gives if it knows the experts ``kept_E`` alone.

    Returns:
        Logits (T, E) of these, weights (T, P), and the chosen ones' numbers (T, P) among all.
    """
    narrow: Any = copy.copy(router)
    for tensors in ("_parameters", "_buffers"):
        rows = {name: t if t is None else t[kept_E] for name, t in vars(router)[tensors].items()}
        vars(narrow)[tensors] = rows
    narrow.num_experts = len(kept_E)
    logits, weights, chosen = narrow.forward(*args)
    return logits, weights, kept_E[chosen]


def without(router: nn.Module, x_TD: Tensor, expert: int) -> Routing:
    """Where tokens (T, D) would be sent if there were no such expert.

    A router that picks groups of experts first wants these to be even; there the expert stays, and
    is never chosen.
    """
    if getattr(router, "num_group", 1) > 1:
        unwanted: Any = copy.copy(router)
        bias_E = router.get_buffer("e_score_correction_bias").clone()
        bias_E[expert] = -torch.inf
        vars(unwanted)["_buffers"] = {**router._buffers, "e_score_correction_bias": bias_E}
        return Routing(x_TD, *unwanted.forward(x_TD))
    count = len(router.weight)  # ty: ignore[invalid-argument-type]
    kept_E = torch.tensor([e for e in range(count) if e != expert], device=x_TD.device)
    return Routing(x_TD, *narrowed(router, kept_E, x_TD))


def _product(x: Tensor, weight: Tensor, *, transposed: bool) -> Tensor:
    return x @ weight if transposed else nn.functional.linear(x, weight)


@dataclass(slots=True)
class Heard:
    """What passed a block's router, piece by piece of a batch."""

    routings: list[Routing] = field(default_factory=list)

    def whole(self) -> Routing:
        """All pieces of the batch in one."""
        parts = [(r.x_TD, r.logits_TE, r.weights_TP, r.chosen_TP) for r in self.routings]
        return Routing(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


@contextmanager
def listening(block: nn.Module, mixture: Mixture) -> Generator[Callable[[], Routing]]:
    """Note what a block's router decides; gives a function for the batch that ran last."""
    heard = Heard()

    def start(*_: object) -> None:
        heard.routings.clear()

    def note(_: nn.Module, args: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> None:
        logits, weights, chosen = out
        x_TD = args[0].flatten(0, -2).detach()
        heard.routings.append(Routing(x_TD, logits, weights, chosen))

    router = block.get_submodule(mixture.router)
    handles = [block.register_forward_pre_hook(start), router.register_forward_hook(note)]
    try:
        yield heard.whole
    finally:
        for handle in handles:
            handle.remove()


def every(experts: Experts, routing: Routing) -> Iterator[tuple[Reached, Tensor, Tensor]]:
    """Every expert that tokens reach: these, what enters its last matrix, and what it gives."""
    for expert in range(experts.count):
        reached = routing.reached(expert)
        if len(reached.tokens_R):
            a_RK = experts.neurons(expert, routing.x_TD[reached.tokens_R])
            yield reached, a_RK, experts.written(expert, a_RK)
