"""The learning rate as a function of the step alone; a resumed run needs no state for it."""

from __future__ import annotations

import math


def factor(step: int, steps: int, *, warmup: float, final: float) -> float:
    """Share of the peak learning rate at ``step`` (from 0) of ``steps``.

    A linear rise over the first ``warmup`` of all steps, then half a cosine down to ``final``,
    which the last step reaches.
    """
    rise = math.ceil(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    left = max(1, steps - 1 - rise)
    done = min(1.0, (step - rise) / left)
    return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2
