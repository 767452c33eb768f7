"""Hard concrete gates: random numbers in [0, 1] that are 0 or 1 with positive probability.

Louizos et al., 1712.01312, with the constants of Sheared LLaMA (2310.06694) and its released
code. A gate with parameter a = log alpha stretches a binary concrete variable beyond [0, 1] and
clamps it there:

    z = clamp(sigmoid((ln u - ln(1 - u) + a) / beta) * (high - low) + low, 0, 1),  u ~ U(0, 1)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOW, HIGH = -0.1, 1.1
TEMPERATURE = 2 / 3  # the released code's; the paper's text says 0.83
EDGE = 1e-6  # u keeps this distance from 0 and 1
LARGEST = math.log(100)  # of |a|
SHARPNESS = 0.8  # of settled gates, as released: sigmoid(0.8 a / beta), at most 0.996


def sample(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """Gates for given uniform numbers; differentiable in ``log_alpha``."""
    u = uniform.clamp(EDGE, 1 - EDGE)
    soft = torch.sigmoid((u.log() - (-u).log1p() + log_alpha) / TEMPERATURE)
    return (soft * (HIGH - LOW) + LOW).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(z > 0) of each gate."""
    return torch.sigmoid(log_alpha - TEMPERATURE * math.log(-LOW / HIGH))


def settled(log_alpha: Tensor) -> Tensor:
    """What a gate is where nothing is to be random, before the lowest are closed."""
    return torch.sigmoid(SHARPNESS * log_alpha / TEMPERATURE)
