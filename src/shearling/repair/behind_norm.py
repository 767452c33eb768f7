"""Writers with a norm between them and the stream, as some families have.

Shapes: B sequences of a batch, S positions, E channels of the stream.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shearling.engine.branches import Branch


def gain_behind(block: nn.Module, half: Branch) -> Tensor | None:
    """The factor of each channel in the norm behind a writer, if there is one."""
    if half.norm is None:
        return None
    writer = block.get_submodule(half.writer)
    assert isinstance(writer, nn.Linear)
    return block.get_submodule(half.norm)(writer.weight.new_ones(1, writer.out_features))[0].float()


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
