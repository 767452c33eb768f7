"""One model's speed against another's, and against what the operations removed promise.

The promise is that time follows floating-point operations: those of a decode step of the larger
model over those of the smaller, the LM head included, at the context that is met on average. It
is `shearling.table.cost`'s count, exact from the table.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from shearling.evaluate.engines import Cell, Timing
from shearling.model.subject import OpenedModel
from shearling.table.cost import flops_per_token


def ratio(
    first: OpenedModel,
    other: OpenedModel,
    cell: Cell,
    before: Sequence[Timing],
    after: Sequence[Timing],
) -> dict[str, Any]:
    """How ``other`` compares with ``first`` in one cell, from the rounds that they share.

    Args:
        first, other: subjects; those that shearling cuts have a layout and a shape.
        before, after: their timings, in the order of the rounds.

    Returns:
        Fields of an entry of a bench's ``ratios``: speed-ups above 1 are for the better. Shares
        removed are null for a model of another family, or of none that shearling knows.
    """
    rounds = list(zip(before, after, strict=True))
    decode = spread(decode_speedup(a, b) for a, b in rounds)
    promise = promised(first, other, cell)
    peaks = [max((t.peak_bytes or 0) for t in timings) for timings in (before, after)]
    return {
        "batch": cell.batch,
        "prompt": cell.prompt,
        "new": cell.new,
        "rounds": len(rounds),
        "prefill_speedup": spread(a.prefill_seconds / b.prefill_seconds for a, b in rounds),
        "decode_speedup": decode,
        "memory_ratio": peaks[1] / peaks[0] if all(peaks) else None,
        "parameters_removed": 1 - other.parameters / first.parameters,
        "block_parameters_removed": _removed_from_blocks(first, other),
        "promised_decode_speedup": promise,
        "share_of_promise": decode["median"] / promise if promise else None,
    }


def promised(first: OpenedModel, other: OpenedModel, cell: Cell) -> float | None:
    """FLOPs of a decode step of ``first`` over those of ``other``; None where one is not known.

    The steps read ``prompt + 1`` to ``prompt + new`` tokens of context; their mean counts.
    """
    steps = [
        sum(
            flops_per_token(one.layout, one.shape, cell.prompt + step)
            for step in range(1, cell.new + 1)
        )
        for one in (first, other)
        if one.layout is not None
    ]
    return steps[0] / steps[1] if len(steps) == 2 else None


def decode_speedup(before: Timing, after: Timing) -> float:
    """A round's ratio of decode times: the median over its turns, each beside its counterpart.

    An interruption falls into one turn of one model, and would weigh in the sum.
    """
    if len(before.turns) == len(after.turns) > 0:
        return statistics.median(a / b for a, b in zip(before.turns, after.turns, strict=True))
    return before.decode_seconds / after.decode_seconds


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, least and most."""
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _removed_from_blocks(first: OpenedModel, other: OpenedModel) -> float | None:
    sizes = [
        one.layout.count_block(one.shape) * one.shape["layers"]
        for one in (first, other)
        if one.layout is not None
    ]
    return 1 - sizes[1] / sizes[0] if len(sizes) == 2 else None


def sentence(compared: dict[str, Any]) -> str:
    """An entry of ``ratios`` for a person."""
    decode = compared["decode_speedup"]
    text = (
        f"{compared['model']['name']}: {decode['median']:.2f}x ({decode['min']:.2f}-"
        f"{decode['max']:.2f}) the decode speed of {compared['against']['name']}"
    )
    removed = compared["block_parameters_removed"]
    if removed:
        text += f" for {_percent(removed)} block parameters"
        text += f" ({_percent(compared['parameters_removed'])} in all)"
    elif compared["parameters_removed"]:
        text += f" for {_percent(compared['parameters_removed'])} parameters"
    if compared["promised_decode_speedup"]:
        text += (
            f"; its FLOPs promise {compared['promised_decode_speedup']:.2f}x, "
            f"of which it gives {compared['share_of_promise']:.2f}"
        )
    load = f"{compared['prompt']}+{compared['new']} tokens"
    where = f"{compared['engine']}, batch {compared['batch']}, {load}"
    return f"{text} ({where})"


def _percent(removed: float) -> str:
    return f"{abs(removed):.1%} {'fewer' if removed > 0 else 'more'}"
