"""Some words that stand for a large vocabulary, whose head would be most of the work.

Of a vocabulary of more than ``EXACT`` words, logits are taken of those that a model gives most
probability on the text's positions, and of ``SAMPLED`` draws from the others, which count for all
of them. With q the chance of a word in a draw (half even, half as the model finds it likely), a
word drawn c times counts c / (SAMPLED q) times, and

    Z = sum over the likely of exp z_i + sum over the drawn of c_j / (SAMPLED q_j) exp z_j

has the whole vocabulary's partition function as its mean over the draws. Its logarithm is too
small in the mean, by Var(Z) / 2 Z^2. One sample serves all positions and models, so that
comparisons have its error in common. Up to ``EXACT`` words, everything is over all of them.

What is likely differs from position to position. On Gemma 3 270M (262 thousand words), asked at
the very positions that are then looked at, ``LIKELY`` words have 98.7 % of the probability: log Z
is off by 0.003 nats (standard deviation over positions; no bias to be seen); of text elsewhere they
have 96.5 %, and log Z is off by 0.28. There ``MORE`` words have 99.9 %, and log Z is off by 0.002.

Shapes: B sequences of S positions; D hidden, V vocabulary, W words that stand for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

EXACT = 2**16  # words up to which nothing stands for anything
LIKELY, MORE = 2**14, 2**16  # those that stand for themselves: on positions asked, or elsewhere
SAMPLED = 2**12
ALL_POSITIONS = 4096  # so many are all asked
POSITIONS = 1024  # and of more, so many
HEAD_ROWS = 64  # positions at a time; of fewer, the head's weights are most of what is read
SEED = 0  # of the draw


@dataclass(frozen=True, slots=True, eq=False)
class Words:
    """Words of a vocabulary, and how many each of them stands for.

    Attributes:
        ids_W: their numbers, ascending.
        log_counts_W: the logarithm of how often each counts; 0 for those that stand for themselves.
    """

    ids_W: Tensor
    log_counts_W: Tensor

    def __len__(self) -> int:
        """How many they are."""
        return len(self.ids_W)

    @staticmethod
    def of(chances_V: Tensor, likely: int) -> Words:
        """The ``likely`` words of the greatest chances, and a sample of the others.

        Args:
            chances_V: the chance of each word; infinity for one that must be there.
            likely: how many; more if more must be there.
        """
        device, chances_V = chances_V.device, chances_V.cpu()
        most = min(max(likely, int(chances_V.isinf().sum())), len(chances_V))
        counts_V = torch.zeros(len(chances_V))
        counts_V[chances_V.topk(most).indices] = 1.0
        rest_R = (counts_V == 0).nonzero().flatten()
        if len(rest_R):
            even_R = torch.full((len(rest_R),), 1 / len(rest_R))
            shares_R = chances_V[rest_R] / chances_V[rest_R].sum()
            q_R = (even_R + shares_R) / 2 if bool(shares_R.isfinite().all()) else even_R
            generator = torch.Generator().manual_seed(SEED)
            drawn = torch.multinomial(q_R, SAMPLED, replacement=True, generator=generator)
            counts_V[rest_R] = drawn.bincount(minlength=len(rest_R)) / (SAMPLED * q_R)
        ids_W = counts_V.nonzero().flatten()
        return Words(ids_W.to(device), counts_V[ids_W].log().to(device))

    def places(self, ids: Tensor) -> Tensor:
        """Where words, that are among them and stand for themselves alone, are (any shape)."""
        places = torch.searchsorted(self.ids_W, ids.contiguous()).clamp_(max=len(self) - 1)
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


def asked(tokens: int, *, elsewhere: bool) -> tuple[int, int]:
    """Every how many-th of so many positions is asked, and how many words then are likely.

    ``elsewhere``: the words are to serve other positions as well.
    """
    if tokens <= ALL_POSITIONS and not elsewhere:
        return 1, LIKELY
    return max(1, tokens // POSITIONS), MORE


def chances(logits: Iterable[Tensor], vocab: int, device: torch.device) -> Tensor:
    """The probabilities (V,) that logits (..., V) give each word, summed over positions."""
    chances_V = torch.zeros(vocab, device=device)
    for logits_BSV in logits:
        chances_V += logits_BSV.flatten(0, -2).float().softmax(-1).sum(0)
    return chances_V
