"""Writers with a norm between them and the stream, as some families have.

Shapes: B sequences of a batch, S positions, E channels of the stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shearling.engine.moments import inverse_energy

LEAST_COSINE = 0.5  # between outputs less alike, chance would set the size


def at_size_of(own_BSE: Tensor, now_BSE: Tensor, gain_E: Tensor) -> Tensor:
    """What the source's writer gave, at the size at which ``now`` comes no nearer by shrinking.

    The norm behind a writer undoes its size. Least squares towards what the source gave shrinks
    whatever is hard to tell, which brings it nearer before the norm, and often farther behind it.
    At the size chosen, one for each sequence, what is missing is at right angles to ``now``.

    Args:
        own_BSE: of the source.
        now_BSE: what the cut's writer gives.
        gain_E: how much of a channel the norm lets through.
    """
    weight_BSE = inverse_energy(own_BSE).unsqueeze(-1) * gain_E.square()
    now_B, own_B, shared_B = (
        (weight_BSE * one * other).sum((1, 2))
        for one, other in ((now_BSE, now_BSE), (own_BSE, own_BSE), (now_BSE, own_BSE))
    )
    least_B = LEAST_COSINE * (now_B * own_B).sqrt()
    size_B = now_B / torch.maximum(shared_B, least_B).clamp_min(1e-30)
    return own_BSE * size_B[:, None, None]


def before_norm(
    y_BSE: Tensor, own_BSE: Tensor, w_BS: Tensor, gain_E: Tensor
) -> tuple[Tensor, Tensor]:
    """What a writer must give so that the norm behind it gives ``y``, at its size in the source.

    A channel that the norm all but silences tells nothing of what came before it.
    """
    rms_BS1 = own_BSE.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
    known = gain_E.abs() > 1e-3 * gain_E.abs().max()
    wanted = torch.where(known, y_BSE / torch.where(known, gain_E, 1.0) * rms_BS1, own_BSE)
    return wanted, w_BS / rms_BS1.squeeze(-1).square()
