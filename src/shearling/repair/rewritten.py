"""More calibration text from little: windows in which the model rewrote some of the tokens.

A repair solves for more numbers than 16 thousand tokens determine. Each window is read once by
the source model, and in copies of it a share of the tokens is replaced by what the model itself
would have said there, drawn from its distribution given the real text before. One walk through
the model serves any number of copies, streamed or not. On SmolLM2, three copies of 64 windows took
a pruned model from 53.9 to 52.7 perplexity on the calibration's domain, and from 62.3 to 55.5 on
another (LOG.md, 2026-11-22). Drawing calibration data from the model that is compressed goes back
to Williams et al., arXiv 2410.17170.

Shapes: N sequences of S positions, in batches of B; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shearling.engine.decoding import draw
from shearling.engine.states import MAIN, States
from shearling.engine.stream import BlockStream
from shearling.engine.walk import Text, forward
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent

SHARES = (0.5,)


@torch.inference_mode()
def augment(
    stream: BlockStream,
    ids_NS: Tensor,
    *,
    shares: Sequence[float] = SHARES,
    seed: int = 0,
    progress: Progress = silent,
) -> Tensor:
    """The sequences themselves, then a rewritten copy of all of them for each share.

    Args:
        stream: the model that rewrites.
        ids_NS: tokens (N, S).
        shares: of the tokens after the first, how many are replaced in each copy.
        seed: of every draw.
        progress: told the blocks done.

    Returns:
        Tokens (N * (1 + len(shares)), S); copy c of sequence n is row (1 + c) * N + n.

    Raises:
        ShearlingError: a share that is not between 0 and 1.
    """
    if not all(0 < share <= 1 for share in shares):
        raise ShearlingError(
            f"shares of tokens to rewrite {list(shares)} were given, but each must lie between "
            "0 and 1, such as 0.5."
        )
    if not shares:
        return ids_NS
    generator = torch.Generator().manual_seed(seed)
    copies: list[list[Tensor]] = [[] for _ in shares]
    with stream.place.running(), States(stream.place) as states:
        text = Text(stream, states).begin(stream.batches(ids_NS))
        for step in forward(text, "rewriting calibration text", progress):
            step.finish()
        for number, ids_BS in enumerate(text.batches):
            for ids, h in stream.slices(ids_BS, states.take(MAIN, number)):
                # One running sum serves the draws of all copies.
                sums_TV = stream.logits(h, ids)[:, :-1].flatten(0, 1).float().softmax(-1)
                sums_TV.cumsum_(-1)
                for copy, share in zip(copies, shares, strict=True):
                    copy.append(_rewritten(ids, sums_TV, share, generator))
    return torch.cat([ids_NS, *(torch.cat(copy) for copy in copies)])


def _rewritten(ids_BS: Tensor, sums_TV: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A copy of sequences in which a share of the tokens behind the first is drawn anew."""
    at_T1 = torch.rand(len(sums_TV), 1, generator=generator).to(sums_TV.device)
    said = draw(sums_TV, at_T1).view(len(ids_BS), ids_BS.shape[1] - 1).to(ids_BS.device)
    chosen = torch.rand(said.shape, generator=generator) < share
    return torch.cat([ids_BS[:, :1], torch.where(chosen, said, ids_BS[:, 1:])], 1)
