"""Repair of a mixture's router: rows of its survivors moved to where the block errs least.

Given which experts a token is sent to, the weights that its router gives them follow from its
logits, and what the block gives is linear in the weights. A Gauss-Newton step on the rows needs of
each token the products Q of what its experts give with one another, and c with what is missing:

    minimise over V   sum_t w_t (dg_t^T Q_t dg_t - 2 c_t^T dg_t) + damping |V|^2,   dg_t = J_t V

with J the router's own derivative, whatever its formula. Conjugate gradients solve it without a
matrix of all rows. A step also sends tokens elsewhere, which no derivative knows: every one is
tried on held-out tokens, routed anew.

Shapes: T tokens of a batch, D hidden, E surviving experts, P experts that a token is sent to.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call, jvp, vjp

from shearling.engine.experts import Experts, Routing, decided
from shearling.engine.ranks import Ranks

# Of the penalty on a change of the rows, in curvatures of the error along its gradient.
DAMPINGS = (0.1, 1.0, 10.0, 100.0)
ITERATIONS = 20  # of conjugate gradients; a step is no better for being exact
OUTPUT_BYTES = 2**27  # of what tokens' experts give, kept at a time


@dataclass(frozen=True, slots=True)
class Products:
    """Of a batch: what enters the router, and products of what each token's experts give.

    Attributes:
        x_TD: router's inputs.
        gram_TPP: w f f^T, f what an expert gives; channels may count unequally.
        cross_TP: w f r, r what is missing from all of them together.
    """

    x_TD: Tensor
    gram_TPP: Tensor
    cross_TP: Tensor


def rerouted(experts: Experts, weight_ED: Tensor, routing: Routing) -> Routing:
    """Where a router with other rows sends tokens; its code and all else of it are its own."""
    tensors = {experts.mixture.rows: weight_ED.to(experts.rows.dtype)}
    out = functional_call(experts.router, tensors, (routing.routed_TD,))
    return routing.rerouted(*decided(out))


def chosen_outputs(experts: Experts, routing: Routing) -> Tensor:
    """What each of a token's experts gives for it (T, P, D), weights aside."""
    tokens, picked = routing.chosen_TP.shape
    given_TPD = routing.x_TD.new_zeros(tokens, picked, routing.x_TD.shape[1], dtype=torch.float32)
    for expert in range(experts.count):
        tokens_R, places_R = (routing.chosen_TP == expert).nonzero(as_tuple=True)
        if len(tokens_R):
            a_RK = experts.neurons(expert, routing.x_TD[tokens_R])
            given_TPD[tokens_R, places_R] = experts.written(expert, a_RK).float()
    return given_TPD


def given_by(experts: Experts, routing: Routing) -> Tensor:
    """What all of a token's experts give together (T, D)."""
    parts = [
        (part.weights_TP.float()[:, None] @ chosen_outputs(experts, part)).squeeze(1)
        for part in _parts(routing)
    ]
    return torch.cat(parts)


def products(
    experts: Experts, routing: Routing, missing_TD: Tensor, weight_T: Tensor,
    importance_D: Tensor | None = None,
) -> Products:  # fmt: skip
    """What a step needs to know of a batch.

    Args:
        experts: who give something.
        routing: which tokens they get.
        missing_TD: what is missing from all of them together.
        weight_T: how much each token counts.
        importance_D: how often errors count a channel's square; once each if not given.
    """
    grams, crosses, done = [], [], 0
    for part in _parts(routing):
        rows = slice(done, done + len(part.x_TD))
        given_TPD, w_T = chosen_outputs(experts, part), weight_T[rows]
        counted_TPD = given_TPD if importance_D is None else given_TPD * importance_D
        grams.append(counted_TPD @ given_TPD.mT * w_T[:, None, None])
        crosses.append((counted_TPD @ missing_TD[rows, :, None]).squeeze(-1) * w_T[:, None])
        done = rows.stop
    return Products(routing.routed_TD, torch.cat(grams), torch.cat(crosses))


def steps(experts: Experts, batches: list[Products], ranks: Ranks) -> Iterator[Tensor]:
    """Changes of a router's rows (E, D), from bold to cautious.

    Args:
        experts: whose router.
        batches: tokens to fit on, of this rank.
        ranks: who share the tokens.
    """
    model = _Quadratic(experts, batches, ranks)
    gradient_ED = model.gradient()
    square = float(gradient_ED.square().sum())
    if square == 0.0:
        return
    curvature = float((gradient_ED * model.curved(gradient_ED)).sum()) / square
    if curvature <= 0.0:
        return
    for damping in DAMPINGS:
        yield _solved(model.curved, gradient_ED, damping * curvature)


class _Quadratic:
    """The error as a function of a small change of the rows, tokens' experts as they are."""

    def __init__(self, experts: Experts, batches: list[Products], ranks: Ranks) -> None:
        self.router, self.rows = experts.router, experts.mixture.rows
        self.batches, self.ranks = batches, ranks
        with _differentiable():
            tensors = dict(self.router.named_parameters()) | dict(self.router.named_buffers())
            self.tensors = {name: t.detach().float().clone() for name, t in tensors.items()}
            self.weight_ED = self.tensors.pop(self.rows)

    def gradient(self) -> Tensor:
        """Half of the error's, downhill (E, D)."""
        return self._sum(lambda batch, weights: batch.cross_TP)

    def curved(self, change_ED: Tensor) -> Tensor:
        """Half of the error's second derivative, times a change of the rows (E, D)."""

        def along(batch: Products, weights: Callable[[Tensor], Tensor]) -> Tensor:
            change_TP = jvp(weights, (self.weight_ED,), (change_ED,))[1]
            return (batch.gram_TPP @ change_TP[..., None]).squeeze(-1)

        return self._sum(along)

    def _sum(self, of: Callable[[Products, Callable[[Tensor], Tensor]], Tensor]) -> Tensor:
        with _differentiable():
            total_ED = torch.zeros_like(self.weight_ED)
            for batch in self.batches:
                x_TD = batch.x_TD.float().clone()

                def weights(weight_ED: Tensor, x_TD: Tensor = x_TD) -> Tensor:
                    tensors = self.tensors | {self.rows: weight_ED}
                    return functional_call(self.router, tensors, (x_TD,))[1].float()

                pulled_TP = of(batch, weights).clone()
                pull = vjp(weights, self.weight_ED)[1]
                total_ED += pull(pulled_TP)[0]
            total_ED = total_ED.detach()
        self.ranks.add(total_ED)
        return total_ED


def _solved(product: Callable[[Tensor], Tensor], right_ED: Tensor, penalty: float) -> Tensor:
    """Conjugate gradients: (A + penalty) V = right, A given by its products."""
    solution_ED = torch.zeros_like(right_ED)
    residual_ED = right_ED.clone()
    direction_ED = residual_ED.clone()
    square = float(residual_ED.square().sum())
    enough = 1e-8 * square
    for _ in range(ITERATIONS):
        curved_ED = product(direction_ED) + penalty * direction_ED
        length = square / float((direction_ED * curved_ED).sum())
        solution_ED = solution_ED + length * direction_ED
        residual_ED = residual_ED - length * curved_ED
        before, square = square, float(residual_ED.square().sum())
        if square <= enough:
            break
        direction_ED = residual_ED + (square / before) * direction_ED
    return solution_ED


def _parts(routing: Routing) -> list[Routing]:
    """As many tokens at a time as outputs may be alive of."""
    tokens, picked = routing.chosen_TP.shape
    most = max(1, OUTPUT_BYTES // (4 * picked * routing.x_TD.shape[1]))
    return [routing.part(slice(at, at + most)) for at in range(0, tokens, most)]


@contextmanager
def _differentiable() -> Generator[None]:
    """A repair runs in inference mode, whose tensors nothing can be differentiated by."""
    with torch.inference_mode(False), torch.enable_grad():
        yield
