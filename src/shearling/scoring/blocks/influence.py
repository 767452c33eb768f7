"""Block influence: how far a block turns the residual stream.

ShortGPT, arXiv 2403.03853, equation 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shearling.engine.states import States
from shearling.engine.stream import BlockStream
from shearling.engine.walk import Text, forward
from shearling.files.progress import Progress, silent
from shearling.scoring.registry import criterion
from shearling.scoring.scores import Scores


@criterion(
    "influence", of="blocks", reads=("text",), windows=(10, 128), one_pass=True,
    order=50,
    says="1 - cosine(state before the block, state after it): how far it turns what passes through",
    work="ShortGPT", paper="2403.03853",
)  # fmt: skip
@torch.inference_mode()
def influence(
    stream: BlockStream, ids_NS: Tensor, *, protected: tuple[int, ...], progress: Progress = silent
) -> Scores:
    """1 - cosine(state before the block, state after it), averaged over tokens."""
    ranks, cosines = stream.place.ranks.of(len(ids_NS)), []
    with stream.place.running(), States(stream.place) as states:
        text = Text(stream, states).begin(stream.batches(ranks.share(ids_NS)))
        for step in forward(text, "scoring by block influence", progress):
            cosine = 0.0
            for run in step.passes:
                similarity_BS = torch.cosine_similarity(
                    run.before_BSD.double(), run.after_BSD.double(), dim=-1
                )
                cosine += float(similarity_BS.sum())
            cosines.append(cosine)
    values = [1.0 - cosine / ids_NS.numel() for cosine in ranks.totals(cosines)]
    return Scores("influence", "layers", (tuple(values),), protected)
