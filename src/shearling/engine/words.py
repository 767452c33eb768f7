"""Some words that stand for a large vocabulary, whose head would be most of the work.

Of a vocabulary of more than ``EXACT`` words, logits are taken of the ``LIKELY`` words that a model
gives most probability on some positions of the text, and of ``SAMPLED`` others, drawn evenly from
the rest, which stand for all of it: each counts as often as the rest has words for one drawn. With
z the logits and w these counts,

    Z = sum over the likely of exp z_i + w * sum over the sampled of exp z_j

has the whole vocabulary's partition function as its mean over the draws. Its logarithm is too
small in the mean, by Var(Z) / 2 Z^2: of second order in what the sample misses, a share of the
rest's probability. One sample serves all positions and models, so that comparisons have its error
in common. Up to ``EXACT`` words, everything is computed over all of them.

Shapes: B sequences of S positions; D hidden, V vocabulary, W words that stand for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

EXACT = 2**16  # words up to which nothing stands for anything
LIKELY, SAMPLED = 2**14, 2**12
POSITIONS = 1024  # of the text, at which a model is asked for its likely words
SEED = 0  # of the draw


@dataclass(frozen=True, slots=True, eq=False)
class Words:
    """Words of a vocabulary, and how many each of them stands for.

    Attributes:
        ids_W: their numbers, ascending.
        log_counts_W: the logarithm of how many words each stands for; 0 for itself alone.
    """

    ids_W: Tensor
    log_counts_W: Tensor

    def __len__(self) -> int:
        """How many they are."""
        return len(self.ids_W)

    @staticmethod
    def of(chances_V: Tensor, likely: int | None = None) -> Words:
        """The ``likely`` words of the greatest chances, and a sample of the others.

        Args:
            chances_V: the chance of each word; infinity for one that must be there.
            likely: how many, ``LIKELY`` if not given; more if more must be there.
        """
        vocab, device = len(chances_V), chances_V.device
        most = max(LIKELY if likely is None else likely, int(chances_V.isinf().sum()))
        log_counts_V = chances_V.new_full((vocab,), -torch.inf)
        if most < vocab:
            rest_V = torch.ones(vocab, dtype=torch.bool, device=device)
            rest_V[chances_V.topk(most).indices] = False
            rest_R = rest_V.nonzero().flatten()
            drawn = torch.randperm(len(rest_R), generator=torch.Generator().manual_seed(SEED))
            sampled = rest_R[drawn[:SAMPLED].to(device)]
            log_counts_V[~rest_V] = 0.0
            log_counts_V[sampled] = math.log(len(rest_R) / len(sampled))
        else:
            log_counts_V.zero_()
        ids_W = log_counts_V.isfinite().nonzero().flatten()
        return Words(ids_W, log_counts_V[ids_W])

    def places(self, ids: Tensor) -> Tensor:
        """Where words, that are among them and stand for themselves alone, are (any shape)."""
        places = torch.searchsorted(self.ids_W, ids).clamp_(max=len(self) - 1)
        assert torch.equal(self.ids_W[places], ids), "a word that is not among those chosen"
        return places

    def head(self, head: nn.Linear) -> nn.Linear:
        """A head of their rows alone."""
        bias_V = head.bias
        narrow = nn.Linear(head.in_features, len(self), bias=bias_V is not None, device="meta")
        narrow.weight = nn.Parameter(head.weight[self.ids_W], requires_grad=False)
        if bias_V is not None:
            narrow.bias = nn.Parameter(bias_V[self.ids_W], requires_grad=False)
        return narrow


def is_large(vocab: int) -> bool:
    """Whether some words stand for a vocabulary of so many."""
    return vocab > EXACT


def spread(count: int, tokens: int) -> int:
    """Of so many tokens, every how many-th is to be looked at for ``count`` of them."""
    return max(1, tokens // max(1, count))


def chances(logits: Iterable[Tensor], vocab: int, device: torch.device) -> Tensor:
    """The probabilities (V,) that logits (..., V) give each word, summed over positions."""
    chances_V = torch.zeros(vocab, device=device)
    for logits_BSV in logits:
        chances_V += logits_BSV.flatten(0, -2).float().softmax(-1).sum(0)
    return chances_V
