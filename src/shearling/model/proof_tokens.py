"""The tokens that proofs run two models on: random ones, the same for every proof.

Shapes: B sequences, S positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shearling.model.subject import OpenedModel

SEQUENCES, LENGTH, SEED = 2, 32, 0
_MEDIA = {
    f"{kind}_token_{name}" for kind in ("image", "video", "audio") for name in ("id", "index")
}


def proof_tokens(checkpoint: OpenedModel, length: int = LENGTH) -> Tensor:
    """Two sequences (B, S) over a model's vocabulary, as long as it has positions for.

    None stands for an image or a sound, which a model around the language model looks for.
    """
    length = min(length, getattr(checkpoint.config, "max_position_embeddings", length))
    generator = torch.Generator().manual_seed(SEED)
    ids_BS = torch.randint(checkpoint.shape["vocab"], (SEQUENCES, length), generator=generator)
    wrapping = getattr(checkpoint, "wrapping", None)
    if wrapping is None:
        return ids_BS
    standing_in = torch.tensor(
        [id_ for key, id_ in wrapping.raw.items() if key in _MEDIA and id_ is not None],
        dtype=torch.long,
    )
    return ids_BS.masked_fill(torch.isin(ids_BS, standing_in), 0)
