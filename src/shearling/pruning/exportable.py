"""What llama.cpp will not load of a cut, said before any work: the shape alone decides.

``shearling export`` refuses such a model (:mod:`shearling.ship.computes`); transformers loads it,
so that nothing is refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from shearling.model.checkpoint import Checkpoint
from shearling.pruning.pattern import Pattern, pattern_of, scaled_otherwise
from shearling.table.families import legal
from shearling.table.families.llama_cpp import LlamaCppFacts, LlamaCppLimit
from shearling.table.values import Shape


def tell_limits(source: Checkpoint, after: Shape, notify: Callable[[str], None]) -> None:
    """Say what llama.cpp takes for granted and a cut to ``after`` breaks, and what would do.

    What the source breaks itself is nothing that a cut could mend, and is not told.
    """
    facts = source.family.llama_cpp
    if facts is None:
        return
    for reason in (*_sizes(source, after, facts), *_blocks(source, after)):
        notify(f"transformers loads this shape, but `shearling export` will refuse it: {reason}.")


def _sizes(source: Checkpoint, after: Shape, facts: LlamaCppFacts) -> Iterator[str]:
    """Limits on sizes."""
    before = set(facts.broken(source.config, source.shape))
    for limit in facts.broken(source.config, after):
        if limit.axes and limit not in before:
            yield (
                f"llama.cpp's code for {facts.architecture} wants {limit.wants.format(**after)}; "
                f"{_instead(source, after, limit)}"
            )


def _instead(source: Checkpoint, after: Shape, limit: LlamaCppLimit) -> str:
    """The nearest shape that keeps to a limit."""
    rule = legal.Rule(limit.axes, limit.wants, lambda shape: limit.holds(source.config, shape))
    rules = (*source.family.legality(source.config), rule)
    if "hidden" in limit.axes:  # nobody means 1,559 where 1,536 is 24 heads of 64
        rules = (*rules, legal.divided_hidden(source.family.model_type))
    near = legal.nearest(rules, source.shape, after, count=1)
    if not near:
        return "no smaller shape would do"
    axes = [axis for axis in after if axis in limit.axes or near[0][axis] != after[axis]]
    return f"{', '.join(f'{axis}={near[0][axis]}' for axis in axes)} would do"


def _blocks(source: Checkpoint, after: Shape) -> Iterator[str]:
    """What llama.cpp makes of a number of blocks, whichever they are."""
    pattern, before, depth = (
        pattern_of(source.family, source.config), source.shape["layers"], after["layers"],
    )  # fmt: skip
    if pattern is None:
        return
    taken = scaled_otherwise(pattern, after)
    if taken is not None and scaled_otherwise(pattern, source.shape) is None:
        other = depth - 1 if depth > 1 and _scaled_aright(pattern, after, depth - 1) else None
        would = f"layers={other} would do" if other else "leave hidden and heads as they are"
        yield (
            f"llama.cpp divides the attention of a {pattern.facts.architecture} of {depth} blocks "
            f"by the root of {taken}, where this model's is divided by that of "
            f"{pattern.scalar:g}; {would}"
        )
    known = len(pattern.kinds) == before  # not so of what a recipe's earlier cut will leave
    if not known or depth == before or not pattern.matters(source.config):
        return
    if pattern.holds(range(before)) and not pattern.removals(before - depth, 1):
        near = sorted(pattern.depths(), key=lambda other: (abs(other - depth), -other))[:2]
        would = f"layers={' or '.join(map(str, sorted(near)))} would do" if near else "none would"
        yield (
            f"llama.cpp counts of which kind each block is, and no {before - depth} of {before} "
            f"blocks can go and leave the others in that order; {would}"
        )


def _scaled_aright(pattern: Pattern, after: Shape, depth: int) -> bool:
    return scaled_otherwise(pattern, after.with_(layers=depth)) is None
