"""Block influence: how far a block turns the residual stream.

ShortGPT, arXiv 2403.03853, equation 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shearling.engine.products import fast_products
from shearling.engine.stream import BlockStream
from shearling.files.progress import Progress, silent
from shearling.scoring.scores import Scores


@torch.inference_mode()
@fast_products()
def influence(
    stream: BlockStream, ids_NS: Tensor, *, protected: tuple[int, ...], progress: Progress = silent
) -> Scores:
    """1 - cosine(state before the block, state after it), averaged over tokens."""
    batches = stream.batches(ids_NS)
    begun = [stream.begin(ids_BS) for ids_BS in batches]
    states = [h_BSD for h_BSD, _ in begun]
    values = []
    for index in range(stream.depth):
        cosine = 0.0
        with stream.block(index) as block:
            for number, (_, calls) in enumerate(begun):
                after_BSD = calls[index](block, states[number])
                similarity_BS = torch.cosine_similarity(
                    states[number].double(), after_BSD.double(), dim=-1
                )
                cosine += float(similarity_BS.sum())
                states[number] = after_BSD
        values.append(1.0 - cosine / ids_NS.numel())
        progress("scoring by block influence", index + 1, stream.depth)
    return Scores("influence", "layers", tuple(values), protected)
