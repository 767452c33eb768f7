"""What a repaired cut lost on each of several calibration sources.

Measured on the windows that the repair held out, the text itself and no copies of it, over all
words: one more product with both heads, where both models' last states are at hand. The held-out
windows chose how strong the repair is, and nothing was solved on them.

Shapes: B sequences of a batch, S positions, P those that predict, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shearling.engine.moments import held_rows
from shearling.engine.stream import BlockStream
from shearling.engine.walk import Text
from shearling.repair.calibration import Calibration
from shearling.repair.final_norm import FittedGain, Triple, gain_name
from shearling.repair.result import SourceDamage
from shearling.repair.source_walk import SourceWalk

LARGEST = 700.0  # nats whose exponential is a number still
NONE = -1  # the source of a copy, and of what the model wrote


@dataclass(frozen=True, slots=True)
class Apart:
    """Which of several sources each window is of.

    Attributes:
        names: of the sources.
        origins: the source's number, for each window.
    """

    names: tuple[str, ...]
    origins: tuple[int, ...]

    @staticmethod
    def of(text: Calibration) -> Apart | None:
        """Those of a text; None where there is one source alone."""
        if len(text.sources) < 2:
            return None
        return Apart(tuple(one.name for one in text.sources), text.origins)

    def held(self, sequences: int) -> Tensor:
        """The source of each held-out sequence, `NONE` for those that are no windows."""
        windows = len(self.origins)
        of_N = torch.full((sequences,), NONE)
        of_N[:windows] = torch.tensor(self.origins)
        return of_N[held_rows(sequences, windows)]


@torch.no_grad()
def damage_by_source(
    walk: SourceWalk, cut: Text, apart: Apart, gain: FittedGain | None = None
) -> tuple[SourceDamage, ...]:
    """The damage on each source that has held-out windows.

    Args:
        walk: the source model's states, behind its last block.
        cut: those of the repaired model, which nothing needs afterwards.
        apart: the sources.
        gain: the final norm's, if it was fitted.
    """
    if gain is not None:
        name = gain_name(cut.stream)
        assert name is not None
        cut.stream.outside(name).data.copy_(gain.gain_D)
    source, names = walk.text, apart.names
    of_N = walk.ranks.share(apart.held(walk.sequences), backward=True)
    # windows, tokens, negative log-likelihood of both models, divergence
    device = source.stream.place.device
    sums_5N = torch.zeros(5, len(names), dtype=torch.float64, device=device)
    numbers = [number for number, is_held in enumerate(walk.held) if is_held]
    sizes = [len(cut.batches[number]) for number in numbers]
    for number, of_B in zip(numbers, of_N.split(sizes), strict=True):
        rows_B = of_B != NONE
        if not rows_B.any():
            continue
        states = (text.states.get(text.key, number) for text in (source, cut))
        chosen = [tensor[rows_B.to(tensor.device)] for tensor in (cut.batches[number], *states)]
        for ids, h, c, of in source.stream.slices(*chosen, of_B[rows_B]):
            figures_5B = _figures(source.stream, cut.stream, (ids, h, c))
            sums_5N.index_add_(1, of.to(device), figures_5B)
    walk.ranks.add(sums_5N)
    damages = []
    for name, figures in zip(names, sums_5N.T.tolist(), strict=True):
        windows, tokens, *nats = figures
        if tokens:
            *losses, divergence = (one / tokens for one in nats)
            before, after = (math.exp(min(loss, LARGEST)) for loss in losses)
            counts = int(windows), int(tokens)
            damages.append(SourceDamage(name, *counts, before, after, divergence))
    return tuple(damages)


def _figures(source: BlockStream, cut: BlockStream, states: Triple) -> Tensor:
    """Of each sequence (5, B): 1, predicted tokens, both models' losses and the divergence."""
    ids_BS, h_BSD, c_BSE = states
    log_p_BPV = source.logits(h_BSD.clone(), ids_BS)[:, :-1].float().log_softmax(-1)
    log_q_BPV = cut.logits(c_BSE.clone(), ids_BS)[:, :-1].float().log_softmax(-1)
    said_BP1 = ids_BS[:, 1:, None].to(log_p_BPV.device)
    before_B, after_B = (
        -of.gather(-1, said_BP1).squeeze(-1).double().sum(1) for of in (log_p_BPV, log_q_BPV)
    )
    nats_B = (log_p_BPV.exp() * (log_p_BPV - log_q_BPV)).sum(-1).double().sum(1)
    ones_B = torch.ones_like(nats_B)
    return torch.stack([ones_B, ones_B * said_BP1.shape[1], before_B, after_B, nats_B])
