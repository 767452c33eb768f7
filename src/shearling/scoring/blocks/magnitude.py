"""Sum of absolute weights of a block.

Shortened LLaMA, arXiv 2402.02834, section 3.1 (after Li et al., arXiv 1608.08710).
"""

from __future__ import annotations

import torch

from shearling.files.progress import Progress, silent
from shearling.model.checkpoint import Checkpoint
from shearling.scoring.registry import criterion
from shearling.scoring.scores import Scores


@criterion(
    "magnitude", of="blocks", reads=("weights",), plus=True, order=40,
    says="sum of the block's absolute weights", work="Shortened LLaMA", paper="2402.02834",
)  # fmt: skip
def magnitude(
    checkpoint: Checkpoint, *, protected: tuple[int, ...], progress: Progress = silent
) -> Scores:
    """Sum of |W| over each block's matrices and norm weights; needs no text and runs nothing."""
    depth = checkpoint.shape["layers"]
    values = []
    for block in range(depth):
        names = weight_names(checkpoint, block)
        total = sum(
            float(tensor.abs().sum(dtype=torch.float64)) for _, tensor in checkpoint.read(names)
        )
        values.append(total)
        progress("scoring by magnitude", block + 1, depth)
    return Scores("magnitude", "layers", (tuple(values),), protected)


def weight_names(checkpoint: Checkpoint, block: int) -> list[str]:
    """Names of a block's matrices and norm weights, which the paper's sums run over."""
    tensors = checkpoint.layout.block_tensors(block, checkpoint.shape)
    return [name for name, row in tensors.items() if row.role in ("linear", "norm")]
