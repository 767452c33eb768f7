"""Scores of the experts of a mixture, and of the neurons inside them.

Shapes: B sequences of a batch, S positions; T = B S tokens, D hidden, E experts, K neurons of an
expert, R tokens that reach an expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shearling.engine.experts import Experts, Routing, every, has_experts, listening, without
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
            w the inverse energy of the state behind the block, g the router's weight.
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
    if checkpoint.family.mixture is None:
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
    sums_XE = [torch.zeros(shape[EXPERTS], dtype=torch.float64) for _ in range(4)]
    energy_EK = torch.zeros(shape[EXPERTS], shape[EXPERT_MLP], dtype=torch.float64)
    if not has_experts(stream.checkpoint, step.index):
        step.finish()
        return Routed(*sums_XE), energy_EK
    experts = Experts(step.block, mixture)
    with listening(step.block, mixture) as routing_of:
        for run in step.passes:
            check_state(step.index, run.after_BSD)
            routing = routing_of()
            weight_T = 1 / run.after_BSD.flatten(0, 1).float().square().sum(-1).clamp_min(1e-12)
            _add(sums_XE, energy_EK, experts, routing, weight_T)
    ranks.add(*sums_XE, energy_EK)
    columns_EK = torch.stack(
        [experts.writer(expert).double().square().sum(0).cpu() for expert in range(experts.count)]
    )
    return Routed(*sums_XE), energy_EK * columns_EK


def _add(
    sums_XE: list[Tensor], energy_EK: Tensor, experts: Experts, routing: Routing, weight_T: Tensor
) -> None:
    """Add a batch's tokens to the sums."""
    tokens_E, norm_E, weighted_E, lost_E = sums_XE
    given = Given(experts, routing)
    for reached, a_RK, out_RD in every(experts, routing):
        expert, norm_R = reached.expert, out_RD.float().norm(dim=-1)
        tokens_E[expert] += len(norm_R)
        norm_E[expert] += norm_R.sum(dtype=torch.float64).cpu()
        weighted_E[expert] += (reached.weights_R.float() * norm_R).sum(dtype=torch.float64).cpu()
        scale_R = weight_T[reached.tokens_R] * reached.weights_R.float().square()
        energy_EK[expert] += (scale_R @ a_RK.float().square()).double().cpu()
    if experts.count <= routing.chosen_TP.shape[1]:
        return  # none can go
    whole_TD = given(routing, torch.arange(len(routing.x_TD), device=routing.x_TD.device))
    for expert in range(experts.count):
        tokens_R = routing.reached(expert).tokens_R
        if len(tokens_R):
            changed = without(experts.router, routing.x_TD[tokens_R], expert)
            lost_RD = given(changed, tokens_R) - whole_TD[tokens_R]
            lost_R = weight_T[tokens_R] * lost_RD.square().sum(-1)
            lost_E[expert] += lost_R.sum(dtype=torch.float64).cpu()


class Given:
    """What experts give, together, for tokens of a batch; each runs a token once at most."""

    def __init__(self, experts: Experts, routing: Routing) -> None:
        """Nothing is run yet."""
        self.experts, self.routing = experts, routing
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, routing: Routing, tokens_R: Tensor) -> Tensor:
        """The sum (R, D) over the experts chosen in ``routing`` of tokens ``tokens_R``."""
        out_RD = torch.zeros_like(routing.x_TD, dtype=torch.float32)
        for expert in range(self.experts.count):
            reached = routing.reached(expert)
            if len(reached.tokens_R):
                f_RD = self._outputs(expert, tokens_R[reached.tokens_R])
                out_RD.index_add_(0, reached.tokens_R, reached.weights_R.float()[:, None] * f_RD)
        return out_RD

    def _outputs(self, expert: int, tokens_R: Tensor) -> Tensor:
        x_TD = self.routing.x_TD
        if expert not in self._known:
            self._known[expert] = (
                torch.zeros(len(x_TD), dtype=torch.bool, device=x_TD.device),
                torch.empty_like(x_TD, dtype=torch.float32),
            )
        known_T, f_TD = self._known[expert]
        new_N = tokens_R[~known_T[tokens_R]]
        if len(new_N):
            a_NK = self.experts.neurons(expert, x_TD[new_N])
            f_TD[new_N] = self.experts.written(expert, a_NK).float()
            known_T[new_N] = True
        return f_TD[tokens_R]
