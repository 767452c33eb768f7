"""Scores of the experts of a mixture, and of the neurons inside them.

Shapes: B sequences of a batch, S positions; T = B S tokens, D hidden, E experts, K neurons of an
expert, R tokens that reach an expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shearling.engine.branches import branches, gain_behind, watching
from shearling.engine.experts import Experts, Routing, every, has_experts, listening, without
from shearling.engine.moments import inverse_energy
from shearling.engine.peak import OUTPUT_BYTES
from shearling.engine.ranks import Ranks
from shearling.engine.states import States
from shearling.engine.stream import BlockStream
from shearling.engine.walk import Step, Text, check_state, forward
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.scoring.experts.routed import Routed
from shearling.scoring.registry import find
from shearling.scoring.scores import Scores
from shearling.table.axes import EXPERT_MLP, EXPERTS

EXPERT_AXES = (EXPERTS, EXPERT_MLP)


@torch.inference_mode()
def score_experts(
    stream: BlockStream,
    by: str,
    ids_NS: Tensor,
    axes: Sequence[str] = (EXPERTS,),
    *,
    progress: Progress = silent,
) -> dict[str, Scores]:
    """Score experts, and the neurons inside them, in one walk through the model.

    Args:
        stream: the model.
        by: a criterion of experts. Neurons are scored by their energy whatever it is: the sum
            over their expert's tokens of w (g a)^2, times the square of their column's norm, with
            w the inverse energy of the state behind the block, g the router's weight. Where a norm
            is behind the experts, which makes all tokens alike, w is of what these give together,
            and channels count as the norm's factors do.
        ids_NS: calibration tokens (N, S).
        axes: ``experts``, ``expert_mlp`` or both.
        progress: told the blocks done.

    Returns:
        Scores by axis; of neurons, a block's are those of its experts one after the other. Blocks
        without experts have zeros.

    Raises:
        ShearlingError: a model without experts, an unknown criterion, or activations that are not
            finite.
    """
    criterion = find(by, "experts")
    sums, neurons = routed(stream, ids_NS, f"scoring experts by {by}", progress)
    rows = {
        EXPERTS: (by, [criterion.function(of_block) for of_block in sums]),
        EXPERT_MLP: ("energy", [energy_EK.flatten() for energy_EK in neurons]),
    }
    return {
        axis: Scores(
            rows[axis][0], axis, tuple(tuple(row.tolist()) for row in rows[axis][1])
        ).require_finite(stream.checkpoint.name)
        for axis in axes
    }


@torch.inference_mode()
def routed(
    stream: BlockStream, ids_NS: Tensor, stage: str, progress: Progress = silent
) -> tuple[list[Routed], list[Tensor]]:
    """What every block's router and experts do on a text, and their neurons' energies (E, K).

    Blocks without experts have zeros. Raises as :func:`score_experts`.
    """
    checkpoint = stream.checkpoint
    if not checkpoint.layout.routed:
        raise ShearlingError(
            f"{checkpoint.name} has no experts to score; its axes are "
            f"{', '.join(checkpoint.layout.axis)}."
        )
    ranks = stream.place.ranks.of(len(ids_NS))
    sums, neurons = [], []
    with stream.place.running(), States(stream.place) as states:
        text = Text(stream, states).begin(stream.batches(ranks.share(ids_NS)))
        for step in forward(text, stage, progress):
            of_block, energy_EK = _sums(step, stream, ranks)
            sums.append(of_block)
            neurons.append(energy_EK)
    return sums, neurons


def _sums(step: Step, stream: BlockStream, ranks: Ranks) -> tuple[Routed, Tensor]:
    """What a block's experts do on the text, and the energy of each neuron (E, K)."""
    mixture, shape = stream.checkpoint.family.mixture, stream.checkpoint.shape
    assert mixture is not None
    zeros_E = torch.zeros(shape[EXPERTS], dtype=torch.float64, device=stream.place.device)
    sums_XE = [zeros_E.clone() for _ in range(4)]
    energy_EK = zeros_E.new_zeros(shape[EXPERTS], shape[EXPERT_MLP])
    if not has_experts(stream.checkpoint, step.index):
        step.finish()
        return Routed(*(sums_E.cpu() for sums_E in sums_XE)), energy_EK.cpu()
    experts, half = Experts(step.block, mixture), branches(stream.checkpoint, step.index)[-1]
    gain_D = gain_behind(step.block, half)
    behind = [] if gain_D is None else [half]
    with listening(step.block, mixture) as routing_of, watching(step.block, behind) as seen:
        for run in step.passes:
            check_state(step.index, run.after_BSD)
            routing = routing_of()
            behind_BSD = run.after_BSD if gain_D is None else seen.outputs[half.axis]
            weight_T = inverse_energy(behind_BSD.flatten(0, 1).float())
            _add(sums_XE, energy_EK, experts, routing, weight_T, gain_D)
    ranks.add(*sums_XE, energy_EK)
    energy_EK *= torch.stack(
        [_columns(experts.writer(expert), gain_D) for expert in range(experts.count)]
    )
    return Routed(*(sums_E.cpu() for sums_E in sums_XE)), energy_EK.cpu()


def _columns(writer_DK: Tensor, gain_D: Tensor | None) -> Tensor:
    """The square of each column's norm (K), in double precision."""
    written_DK = writer_DK.double()
    if gain_D is not None:
        written_DK = written_DK * gain_D[:, None]
    return written_DK.square().sum(0)


def _add(
    sums_XE: list[Tensor], energy_EK: Tensor, experts: Experts, routing: Routing,
    weight_T: Tensor, gain_D: Tensor | None,
) -> None:  # fmt: skip
    """Add a batch's tokens to the sums."""
    tokens_E, norm_E, weighted_E, lost_E = sums_XE
    for reached, a_RK, out_RD in every(experts, routing):
        expert, norm_R = reached.expert, out_RD.float().norm(dim=-1)
        tokens_E[expert] += len(norm_R)
        norm_E[expert] += norm_R.sum(dtype=torch.float64)
        weighted_E[expert] += (reached.weights_R.float() * norm_R).sum(dtype=torch.float64)
        scale_R = weight_T[reached.tokens_R] * reached.weights_R.float().square()
        energy_EK[expert] += (scale_R @ a_RK.float().square()).double()
    if experts.count <= routing.chosen_TP.shape[1]:
        return  # none can go
    for tokens_N in torch.arange(len(routing.x_TD)).split(_tokens_at_once(experts, routing)):
        rows = slice(int(tokens_N[0]), int(tokens_N[-1]) + 1)
        lost_E += _lost(experts, routing.part(rows), weight_T[rows], gain_D)


def _tokens_at_once(experts: Experts, routing: Routing) -> int:
    """How many tokens' outputs, of every expert, are held together."""
    return max(1, OUTPUT_BYTES // (4 * experts.count * routing.x_TD.shape[1]))


def _lost(experts: Experts, routing: Routing, weight_T: Tensor, gain_D: Tensor | None) -> Tensor:
    """By expert (E), the sum of w ||y' - y||^2 over its tokens, y' what they get without it.

    With d the change of a token's weights of all experts and G the products of what these give
    for it, that is w d^T G d; experts whose weight never changes are not run.
    """
    whole_TE = routing.dense(experts.count)
    changes: list[tuple[Tensor, Tensor]] = []
    wanted_TE = torch.zeros_like(whole_TE, dtype=torch.bool)
    for expert in range(experts.count):
        tokens_R = routing.reached(expert).tokens_R
        change_RE = whole_TE.new_zeros(0, experts.count)
        if len(tokens_R):
            changed = without(experts, routing.part(tokens_R), expert)
            change_RE = changed.dense(experts.count) - whole_TE[tokens_R]
            wanted_TE[tokens_R] |= change_RE != 0
        changes.append((tokens_R, change_RE))
    given_TED = whole_TE.new_zeros(*whole_TE.shape, routing.x_TD.shape[1])
    for expert in range(experts.count):
        tokens_R = wanted_TE[:, expert].nonzero().flatten()
        if len(tokens_R):
            a_RK = experts.neurons(expert, routing.x_TD[tokens_R])
            out_RD = experts.written(expert, a_RK).float()
            given_TED[tokens_R, expert] = out_RD if gain_D is None else out_RD * gain_D
    gram_TEE = given_TED @ given_TED.mT
    lost = []
    for tokens_R, change_RE in changes:
        square_R = (change_RE[:, None] @ gram_TEE[tokens_R] @ change_RE[:, :, None]).flatten()
        lost.append((weight_T[tokens_R] * square_R).sum(dtype=torch.float64))
    return torch.stack(lost)
