"""The arithmetic of make_moe.py: neurons into experts, a router, and what experts write, refitted.

Nothing here knows a model. Legend: T tokens, C hidden channels, U neurons, E experts, K experts a
token is sent to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

ROUNDS = 20  # of k-means
SINKHORN_ROUNDS = 200


@dataclass(frozen=True, slots=True)
class Mlp:
    """A gated MLP without biases: ``down(silu(gate x) * up x)``.

    Attributes:
        gate_UC, up_UC, down_CU: its weights.
    """

    gate_UC: Tensor
    up_UC: Tensor
    down_CU: Tensor

    def neurons(self, x_TC: Tensor) -> Tensor:
        """What the neurons hand to ``down`` (T, U)."""
        return silu(x_TC @ self.gate_UC.T) * (x_TC @ self.up_UC.T)


def ridge(x_TC: Tensor, y_TD: Tensor, strength: float, weight_T: Tensor | None = None) -> Tensor:
    """The (C, D) that maps ``x`` to ``y``, least squares with a penalty on its squares.

    The penalty is ``strength`` times the mean square of a column of ``x``, summed over tokens.
    """
    weighted_TC = x_TC if weight_T is None else x_TC * weight_T[:, None]
    gram_CC = (weighted_TC.T @ x_TC).double()
    gram_CC.diagonal().add_(strength * gram_CC.diagonal().mean())
    return torch.linalg.solve(gram_CC, (weighted_TC.T @ y_TD).double()).to(x_TC.dtype)


def centred_ridge(
    x_TC: Tensor, y_TD: Tensor, weight_T: Tensor, strengths: Sequence[float]
) -> tuple[Tensor, float]:
    """As :func:`ridge`, its strength the one that serves the last quarter of the tokens best.

    Returns:
        The (C, D), solved on all tokens, and the strength. With every strength worse than nothing,
        zeros and infinity.
    """
    kept = len(x_TC) * 3 // 4
    weighted_TC = x_TC * weight_T[:, None]
    gram_CC, cross_CD = weighted_TC[:kept].T @ x_TC[:kept], weighted_TC[:kept].T @ y_TD[:kept]
    last_TC, last_TD, last_T = x_TC[kept:], y_TD[kept:], weight_T[kept:]
    best, best_error = float("inf"), (last_TD.square().sum(1) @ last_T).item()
    for strength in strengths:
        miss_TD = last_TD - last_TC @ _solved(gram_CC, cross_CD, strength)
        error = (miss_TD.square().sum(1) @ last_T).item()
        if error < best_error:
            best, best_error = strength, error
    if best == float("inf"):
        return torch.zeros_like(cross_CD), best
    gram_CC += weighted_TC[kept:].T @ last_TC
    cross_CD += weighted_TC[kept:].T @ last_TD
    return _solved(gram_CC, cross_CD, best), best


def _solved(gram_CC: Tensor, cross_CD: Tensor, strength: float) -> Tensor:
    penalised_CC = gram_CC.clone()
    penalised_CC.diagonal().add_(strength * gram_CC.diagonal().mean())
    return torch.cholesky_solve(cross_CD, torch.linalg.cholesky(penalised_CC))


def seen_firing(x_TC: Tensor, firing_TU: Tensor, strength: float) -> Tensor:
    """What of the neurons' firing a linear router could know: features (U, C).

    The firing of each neuron, less its mean, is predicted from ``x``. Rows are the predictions in
    coordinates in which ``x`` is white: their dot products are the predictions' covariances.
    """
    centred_TU = firing_TU - firing_TU.mean(0)
    prediction_CU = ridge(x_TC, centred_TU, strength)
    values_C, vectors_CC = torch.linalg.eigh((x_TC.T @ x_TC / len(x_TC)).double())
    root_CC = (vectors_CC * values_C.clamp(min=0).sqrt()).to(x_TC.dtype)
    return prediction_CU.T @ root_CC


def equal_clusters(features_UD: Tensor, experts: int, seed: int) -> Tensor:
    """Clusters (U) of equally many rows each: k-means whose assignment is balanced.

    Raises:
        ValueError: the rows cannot be shared out equally.
    """
    if len(features_UD) % experts:
        raise ValueError(f"{len(features_UD)} neurons do not divide over {experts} experts")
    centres_ED = _far_apart(features_UD, experts, torch.Generator().manual_seed(seed))
    clusters_U = torch.full((len(features_UD),), -1)
    for _ in range(ROUNDS):
        before_U, clusters_U = clusters_U, _balanced(torch.cdist(features_UD, centres_ED).square())
        if torch.equal(before_U, clusters_U):
            break
        centres_ED = torch.stack([features_UD[clusters_U == e].mean(0) for e in range(experts)])
    return clusters_U


def _far_apart(features_UD: Tensor, experts: int, generator: torch.Generator) -> Tensor:
    """First centres, drawn by their squared distance from those drawn before (k-means++)."""
    first = torch.randint(len(features_UD), (1,), generator=generator)
    centres_ED = features_UD[first]
    while len(centres_ED) < experts:
        distance_U = torch.cdist(features_UD, centres_ED).amin(1).square()
        drawn = torch.multinomial(distance_U, 1, generator=generator)
        centres_ED = torch.cat([centres_ED, features_UD[drawn]])
    return centres_ED


def _balanced(cost_UE: Tensor) -> Tensor:
    """Rows to columns, equally many to each, at little cost.

    Prices of the columns come from Sinkhorn's iteration; then rows choose, those first that lose
    most by their second choice.
    """
    rows, columns = cost_UE.shape
    size = rows // columns
    softness = 0.02 * cost_UE.std()
    price_E = torch.zeros(columns)
    for _ in range(SINKHORN_ROUNDS):
        taken_E = torch.softmax((price_E - cost_UE) / softness, 1).sum(0)
        price_E -= softness * torch.log(taken_E / size).clamp(-20, 20)
    priced_UE = cost_UE - price_E
    two_U2 = priced_UE.topk(2, 1, largest=False).values
    wishes = priced_UE.argsort(dim=1, stable=True).tolist()
    room, chosen_U = [size] * columns, torch.empty(rows, dtype=torch.long)
    for row in (two_U2[:, 1] - two_U2[:, 0]).argsort(descending=True, stable=True).tolist():
        column = next(column for column in wishes[row] if room[column])
        room[column] -= 1
        chosen_U[row] = column
    return chosen_U


def contributions(neurons_TU: Tensor, down_CU: Tensor, clusters_U: Tensor, experts: int) -> Tensor:
    """The norm (T, E) of what each expert's neurons write."""
    norms = [
        (neurons_TU[:, clusters_U == e] @ down_CU[:, clusters_U == e].T).norm(dim=1)
        for e in range(experts)
    ]
    return torch.stack(norms, 1)


def shares(logits_TE: Tensor, active: int) -> Tensor:
    """Routing weights (T, E): softmax over the ``active`` largest logits, zero elsewhere."""
    largest = logits_TE.topk(active, 1)
    weights_TK = torch.softmax(largest.values, 1)
    return torch.zeros_like(logits_TE).scatter(1, largest.indices, weights_TK)


__all__ = [
    "Mlp",
    "centred_ridge",
    "contributions",
    "equal_clusters",
    "ridge",
    "seen_firing",
    "shares",
]
