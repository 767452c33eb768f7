"""Experts that go are folded into those that stay, instead of being left out.

Each goes into the survivor that gives what is most like its own output, cosines averaged over
tokens. An expert's neurons have no order, so that they are matched first, by how their activations
vary together over tokens: the best pair of all, then the best of the rest. Matrices and biases of
an expert and all that are folded into it are then averaged, by how many tokens each was sent.

Published forms differ in what is compared: MC-SMoE (arXiv 2310.01334) takes the router's logits and
matches weights, HC-SMoE (arXiv 2410.08589) clusters what experts give on average.

Shapes: T tokens, D hidden, E experts before the cut, K neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shearling.engine.experts import Experts
from shearling.table.axes import EXPERT_MLP, Row
from shearling.table.values import Shape

SAMPLE = 2048  # tokens by which experts are compared
OUTPUT_BYTES = 2**30  # of what all experts give for these


@dataclass(frozen=True, slots=True)
class Fold:
    """One expert that goes.

    Attributes:
        expert, into: its number before the cut, and that of the survivor that takes it in.
        partner_K: for each neuron of the survivor, the neuron of the expert that joins it.
    """

    expert: int
    into: int
    partner_K: Tensor


def sample_of(x_TD: Tensor, experts: int) -> Tensor:
    """Tokens, evenly spread, few enough that what all experts give for them can be held."""
    most = min(SAMPLE, max(1, OUTPUT_BYTES // (4 * experts * x_TD.shape[1])))
    return x_TD[:: -(-len(x_TD) // most)]


def folds(experts: Experts, kept: Sequence[int], x_TD: Tensor) -> list[Fold]:
    """Where every expert that goes is folded, and how its neurons are matched.

    Args:
        experts: all of them.
        kept: the numbers of those that stay.
        x_TD: tokens to compare them by.
    """
    neurons_TK = {e: experts.neurons(e, x_TD) for e in range(experts.count)}
    lengths_1 = {
        e: nn.functional.normalize(experts.written(e, a_TK).float(), dim=-1)
        for e, a_TK in neurons_TK.items()
    }
    folded = []
    for expert in range(experts.count):
        if expert in kept:
            continue
        alike = [float((lengths_1[expert] * lengths_1[other]).sum(-1).mean()) for other in kept]
        into = kept[alike.index(max(alike))]
        partner_K = matched(neurons_TK[into].float(), neurons_TK[expert].float())
        folded.append(Fold(expert, into, partner_K))
    return folded


def matched(a_TK: Tensor, b_TK: Tensor) -> Tensor:
    """For each column of ``a_TK`` the column of ``b_TK`` (K) that is its own, best pairs first.

    Pairs that are each other's best are the next that taking the best pair of all would find.
    """
    similar_KK = _standard(a_TK).T @ _standard(b_TK)
    count = len(similar_KK)
    partner_K = torch.full((count,), -1, device=similar_KK.device)
    numbers_K = torch.arange(count, device=similar_KK.device)
    for _ in range(count):
        best_K = similar_KK.argmax(1)
        back_K = similar_KK.argmax(0)
        mutual_K = (back_K[best_K] == numbers_K) & (partner_K < 0)
        partner_K[mutual_K] = best_K[mutual_K]
        similar_KK[mutual_K] = -torch.inf
        similar_KK[:, best_K[mutual_K]] = -torch.inf
        if bool((partner_K >= 0).all()):
            break
    return partner_K


def _standard(a_TK: Tensor) -> Tensor:
    """Columns without their mean, of length one; those that never vary are zero."""
    a_TK = a_TK - a_TK.mean(0)
    return a_TK / a_TK.norm(dim=0).clamp_min(1e-20)


def averaged(
    tensors: Mapping[int, Tensor], row: Row, shape: Shape, folded: Sequence[Fold], load_E: Tensor
) -> dict[int, Tensor]:
    """A tensor of every survivor that takes others in, averaged with theirs (float32).

    Args:
        tensors: expert before the cut -> its own, of one row of the table.
        row: the row; of a tensor that holds those of all experts, without its first dimension.
        shape: sizes, which say which of its entries are a neuron's.
        folded: who is folded into whom.
        load_E: how many tokens each expert was sent.
    """
    dims = row.dims[1:] if row.stacked else row.dims
    sums: dict[int, Tensor] = {}
    weights: dict[int, float] = {}
    for fold in folded:
        tensor = tensors[fold.expert].float()
        for dim, formula in enumerate(dims):
            places = formula.select({EXPERT_MLP: tuple(fold.partner_K.tolist())}, shape)
            if places is not None:
                tensor = tensor.index_select(dim, torch.tensor(places, device=tensor.device))
        if fold.into not in sums:
            weights[fold.into] = float(load_E[fold.into]) + 1e-9  # one nobody asks for stays whole
            sums[fold.into] = tensors[fold.into].float() * weights[fold.into]
        load = float(load_E[fold.expert])
        sums[fold.into] = sums[fold.into] + load * tensor
        weights[fold.into] += load
    return {expert: total / weights[expert] for expert, total in sums.items()}
