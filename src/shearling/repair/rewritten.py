"""More calibration text from little: windows in which the model rewrote some of the tokens.

A repair solves for more numbers than 16 thousand tokens determine. Each window is read once by
the source model, and in copies of it a share of the tokens is replaced by what the model itself
would have said there, drawn from its distribution given the real text before. One walk through
the model serves any number of copies, streamed or not. On SmolLM2, three copies of 64 windows took
a pruned model from 53.9 to 52.7 perplexity on the calibration's domain, and from 62.3 to 55.5 on
another (LOG.md, 2026-11-22). Drawing calibration data from the model that is compressed goes back
to Williams et al., arXiv 2410.17170.

Shapes: N sequences of S positions, in batches of B; P = S - 1 positions behind the first; V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shearling.engine.decoding import draw
from shearling.engine.states import MAIN, States
from shearling.engine.stream import BlockStream
from shearling.engine.walk import Text, forward
from shearling.engine.words import Words
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent

SHARES = (0.5,)


@dataclass(frozen=True, slots=True)
class Rewritten:
    """Sequences and their copies.

    Attributes:
        ids_NS: the sequences themselves, then a rewritten copy of all of them for each share.
        words: those that stand for the source's vocabulary on this text, if it is large.
    """

    ids_NS: Tensor
    words: Words | None = None


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
    return rewrite(stream, ids_NS, shares=shares, seed=seed, progress=progress).ids_NS


@torch.inference_mode()
def rewrite(
    stream: BlockStream,
    ids_NS: Tensor,
    *,
    shares: Sequence[float] = SHARES,
    seed: int = 0,
    progress: Progress = silent,
) -> Rewritten:
    """As :func:`augment`, with the words that stand for a large vocabulary."""
    if not all(0 < share <= 1 for share in shares):
        raise ShearlingError(
            f"shares of tokens to rewrite {list(shares)} were given, but each must lie between "
            "0 and 1, such as 0.5."
        )
    if not shares:
        return Rewritten(ids_NS)
    ranks = stream.place.ranks.of(len(ids_NS))
    draws = [
        tuple(ranks.share(torch.cat(parts)) for parts in zip(*copy, strict=True))
        for copy in zip(*_draws(stream, ids_NS, shares, seed), strict=True)
    ]
    copies: list[list[Tensor]] = [[] for _ in shares]
    done = 0
    with stream.place.running(), States(stream.place) as states:
        text = Text(stream, states).begin(stream.batches(ranks.share(ids_NS)))
        for step in forward(text, "rewriting calibration text", progress):
            step.finish()
        last = ((states.get(MAIN, n), ids_BS) for n, ids_BS in enumerate(text.batches))
        words = stream.likely_words(last, ranks=ranks, tokens=ids_NS.numel(), elsewhere=True)
        with stream.abridged(words):
            for number, ids_BS in enumerate(text.batches):
                for ids, h in stream.slices(ids_BS, states.take(MAIN, number)):
                    # One running sum serves the draws of all copies.
                    sums_TV = stream.logits(h, ids)[:, :-1].flatten(0, 1).float().softmax(-1)
                    sums_TV.cumsum_(-1)
                    mine = slice(done, done + len(ids))
                    for copy, (at_NP, chosen_NP) in zip(copies, draws, strict=True):
                        copy.append(_rewritten(ids, sums_TV, at_NP[mine], chosen_NP[mine], words))
                    done += len(ids)
    whole = [ranks.gather(torch.cat(copy), len(ids_NS)) for copy in copies]
    return Rewritten(torch.cat([ids_NS, *whole]), words)


def _draws(
    stream: BlockStream, ids_NS: Tensor, shares: Sequence[float], seed: int
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Of some sequences at a time, for each copy, numbers to draw by and which tokens change.

    Both are (B, P), P the tokens behind the first. They are those of one process, which takes the
    sequences in this order.
    """
    generator = torch.Generator().manual_seed(seed)
    for ids_BS in stream.batches(ids_NS):
        for (ids,) in stream.slices(ids_BS):
            rows, length = ids.shape
            yield [
                (
                    torch.rand(rows * (length - 1), 1, generator=generator).view(rows, -1),
                    torch.rand(rows, length - 1, generator=generator) < share,
                )
                for share in shares
            ]


def _rewritten(
    ids_BS: Tensor, sums_TV: Tensor, at_BP: Tensor, chosen_BP: Tensor, words: Words | None
) -> Tensor:
    """A copy of sequences in which the chosen tokens behind the first are drawn anew."""
    said = draw(sums_TV, at_BP.reshape(-1, 1).to(sums_TV.device)).view(at_BP.shape)
    said = said if words is None else words.ids_W[said]
    said_BP = said.to(ids_BS.device)
    return torch.cat([ids_BS[:, :1], torch.where(chosen_BP, said_BP, ids_BS[:, 1:])], 1)
