"""The tokens that proofs run two models on: random ones, the same for every proof.

Shapes: B sequences, S positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shearling.model.subject import OpenedModel

SEQUENCES, LENGTH, SEED = 2, 32, 0


def proof_tokens(checkpoint: OpenedModel, length: int = LENGTH) -> Tensor:
    """Two sequences (B, S) over a model's vocabulary, as long as it has positions for."""
    length = min(length, getattr(checkpoint.config, "max_position_embeddings", length))
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(checkpoint.shape["vocab"], (SEQUENCES, length), generator=generator)
