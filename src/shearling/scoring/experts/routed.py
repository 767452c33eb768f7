"""Criteria that follow from what a router sends where, and what the experts make of it.

Each is a function of the sums that one walk forward gathers in a block.

Shapes: E experts of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shearling.scoring.registry import criterion


@dataclass(frozen=True, slots=True)
class Routed:
    """Sums over the tokens of a text, of one block, in double precision.

    f is what an expert gives for a token that reaches it, g what the router multiplies it by, w
    the inverse energy of the token's state behind the block; or, where a norm is behind the
    experts, of what these give together.

    Attributes:
        tokens_E: how many tokens reach each expert.
        norm_E: the sum of ||f||.
        weighted_E: the sum of g ||f||.
        lost_E: the sum, over the tokens that reach each expert, of w times the square of what the
            block would give otherwise if the router did not know the expert, and chose and
            weighted the others alone.
    """

    tokens_E: Tensor
    norm_E: Tensor
    weighted_E: Tensor
    lost_E: Tensor


@criterion(
    "reroute", of="experts", reads=("text",), order=10, default="always",
    says="square of what the block gives otherwise without it, long states damped",
    work="ours",
)  # fmt: skip
def reroute(sums: Routed) -> Tensor:
    """Sum over its tokens of w ||y' - y||^2, y' the experts' output without this one.

    Not what the expert gives, which its tokens' next choices give in part, but what is missed.
    """
    return sums.lost_E


@criterion(
    "reap", of="experts", reads=("text",), order=20,
    says="mean of router weight x length of its output, over its tokens",
    work="REAP", paper="2510.13999",
)  # fmt: skip
def reap(sums: Routed) -> Tensor:
    """Mean of g ||f|| over the tokens that reach an expert. REAP, arXiv 2510.13999, equation 9."""
    return sums.weighted_E / sums.tokens_E.clamp_min(1)


@criterion(
    "ean", of="experts", reads=("text",), order=30,
    says="sum of the lengths of its outputs",
    work="EAN", paper="2504.05586",
)  # fmt: skip
def activation_norm(sums: Routed) -> Tensor:
    """Sum of ||f|| over the tokens that reach an expert. EASY-EP's and REAP's baseline EAN."""
    return sums.norm_E


@criterion(
    "frequency", of="experts", reads=("text",), order=40,
    says="how many tokens reach it",
)  # fmt: skip
def frequency(sums: Routed) -> Tensor:
    """The number of tokens that the router sends to an expert."""
    return sums.tokens_E
