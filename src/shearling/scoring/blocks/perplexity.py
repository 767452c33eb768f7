"""Perplexity without a block, and the same again after every removal.

Shortened LLaMA, arXiv 2402.02834, section 3.2: a block's importance is the perplexity that the
model shows on a small calibration set when that block alone is left out. SLEB, arXiv 2402.09025:
remove the least important block, score again, repeat.
"""

from __future__ import annotations

import math

from torch import Tensor

from shearling.engine.removals import Removed, removal_nll
from shearling.engine.stream import BlockStream
from shearling.errors import ShearlingError, count_of
from shearling.files.progress import Progress, silent
from shearling.scoring.registry import criterion
from shearling.scoring.scores import Scores
from shearling.table.kinds import lost, most_removable


@criterion(
    "perplexity", of="blocks", reads=("text",), windows=(10, 128), default="always", order=20,
    says="perplexity of the model without the block", work="Shortened LLaMA", paper="2402.02834",
)  # fmt: skip
def perplexity(
    stream: BlockStream, ids_NS: Tensor, *, protected: tuple[int, ...], progress: Progress = silent
) -> Scores:
    """exp(mean NLL) of the model without each block, exact, in one walk through the weights."""
    singles = [frozenset({block}) for block in range(stream.depth)]
    nll = removal_nll(
        stream, ids_NS, [frozenset(), *singles], progress=progress,
        stage="scoring by perplexity", abridged=True,
    )  # fmt: skip
    baseline, *values = [exp_of(value) for value in nll]
    return Scores("perplexity", "layers", (tuple(values),), protected, baseline_perplexity=baseline)


@criterion(
    "greedy", of="blocks", reads=("text",), windows=(10, 128), removes=True, order=60,
    says="perplexity right after the block's removal, measured again after every removal; of a "
    "block that stays, after its removal as the next",
    work="SLEB", paper="2402.09025",
)  # fmt: skip
def greedy(
    stream: BlockStream,
    ids_NS: Tensor,
    *,
    protected: tuple[int, ...],
    remove: int | None = None,
    progress: Progress = silent,
) -> Scores:
    """Remove the block whose removal hurts least, score again, until ``remove`` are gone.

    The value of a removed block is the perplexity right after its removal; that of a survivor,
    what its removal would have cost in the last round. By default half of those that may go.

    Raises:
        ShearlingError: ``remove`` is more than may go, or less than one.
    """
    kinds = stream.checkpoint.layout.kinds
    free = most_removable(kinds, stream.depth, protected)
    remove = max(1, free // 2) if remove is None else remove
    if not 1 <= remove < stream.depth or remove > free:
        raise ShearlingError(
            f"greedy removal was asked to remove {count_of(remove, 'block')}, but at most "
            f"{min(free, stream.depth - 1)} of {stream.depth} may go."
        )
    gone: Removed = frozenset()
    order: list[int] = []
    values = [math.inf] * stream.depth
    baseline = None
    for turn in range(remove):
        left = [block for block in range(stream.depth) if block not in gone]
        # The intact model is measured once, with the first round, which shares its states.
        wanted = [gone | {block} for block in left] + ([gone] if turn == 0 else [])
        stage = f"greedy removal {turn + 1} of {remove}"
        nll = removal_nll(stream, ids_NS, wanted, progress=progress, stage=stage, abridged=True)
        if turn == 0:
            baseline = exp_of(nll.pop())
        for block, value in zip(left, nll, strict=True):
            values[block] = exp_of(value)
        may_go = (b for b in left if b not in protected and lost(kinds, gone | {b}) is None)
        best = min(may_go, key=lambda b: values[b])
        order.append(best)
        gone |= {best}
    return Scores("greedy", "layers", (tuple(values),), protected, tuple(order), baseline)


def exp_of(nll: float) -> float:
    """exp, or nearly the largest float: a model without its first block may overflow."""
    return math.exp(min(nll, 700.0))
