"""What was measured and planned, in lines for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from shearling.model.checkpoint import Checkpoint
from shearling.table.cost import flops_per_token
from shearling.table.values import Shape
from shearling.targets.asked import TargetLoad, named_bytes, named_ms
from shearling.targets.costs import TimedShape

LITTLE = 0.5  # of the speed-up that operations promise
OTHERWISE = 0.1  # by which speed-ups at two batches differ


def unbought(
    table: Sequence[TimedShape],
    many: Sequence[TimedShape],
    source: Checkpoint,
    load: TargetLoad,
    other: int,
) -> list[str]:
    """What smaller does not buy on this machine, from shapes of which one size differs.

    Args:
        table: the source and other shapes, timed.
        many: the same at a batch of ``other``, or nothing.
        source: the model.
        load: under which ``table`` was timed.
        other: sequences.
    """
    lines = []
    for one, beside in zip_longest(table[1:], many[1:]):
        changed = [axis for axis in one.shape if one.shape[axis] != source.shape[axis]]
        if len(changed) > 1:
            continue
        fewer = f"{changed[0]} {source.shape[changed[0]]} -> {one.shape[changed[0]]}"
        promised = _promised(source, one.shape, load)
        if one.speed - 1 < LITTLE * (promised - 1):
            share = 1 - source.layout.heaviest(one.shape).count(one.shape) / source.parameters
            lines.append(
                f"{fewer} removes {share:.0%} of the parameters and buys little speed here: "
                f"{one.speed:.2f}x, where its operations promise {promised:.2f}x."
            )
        if beside is not None and abs(beside.speed / one.speed - 1) > OTHERWISE:
            lines.append(
                f"{fewer} runs {one.speed:.2f}x as fast with {load.batch} at a time, and "
                f"{beside.speed:.2f}x with {other}."
            )
    return lines


def _promised(source: Checkpoint, shape: Shape, load: TargetLoad) -> float:
    """Operations of a token of the source over those of a shape, halfway through the new ones."""
    context = load.prompt + load.new // 2
    whole = flops_per_token(source.layout, source.shape, context)
    return whole / flops_per_token(source.layout.heaviest(shape), shape, context)


def target_lines(account: Mapping[str, Any], before: Mapping[str, int]) -> list[str]:
    """A plan for a person; ``account`` as the manifest has it, ``before`` the source's sizes."""
    load, measured = account["load"], account["measured"]
    lines = [_row(row, before) for row in account.get("table", ())[1:]]
    if lines:
        whole = account["table"][0]["seconds"]
        lines.insert(
            0,
            f"timed       {load['engine']}, batch {load['batch']}, {load['prompt']}+{load['new']} "
            f"tokens: the source takes {named_ms(whole)} ms a token",
        )
        lines.append(_costs(account["costs"]))
    wanted = ", ".join(
        f"--{name.replace('_', '-')} {text}" for name, text in account["wanted"].items()
    )
    lines.append(f"asked       {wanted}")
    if "predicted" in account:
        lines.append(
            f"planned     {account['predicted']['speed']:.2f}x predicted, {measured['speed']:.2f}x "
            f"timed ({measured['speed_min']:.2f}-{measured['speed_max']:.2f}): "
            f"{named_ms(measured['seconds_per_token'])} ms a token"
        )
    lines.append(
        f"footprint   {named_bytes(measured['footprint_bytes'])} of weights and KV cache (in 16 "
        f"bits), {load['context']:,} tokens of context, batch {load['batch']}"
    )
    if "vocabulary" in account:
        lines.append(words_line(account["vocabulary"]))
    return lines


def words_line(words: Mapping[str, Any]) -> str:
    """What becomes of a vocabulary."""
    return (
        f"words       {words['tokens'] - words['kept']:,} of {words['tokens']:,} go; "
        f"{words['share_spelled_in_pieces']:.3%} of the text's tokens are then spelled in pieces, "
        f"and of more text like it at most about {words['share_unseen']:.1%}"
    )


def _row(row: Mapping[str, Any], before: Mapping[str, int]) -> str:
    shape = row["shape"]
    changed = ", ".join(f"{axis}={size}" for axis, size in shape.items() if size != before[axis])
    return (
        f"  {changed}: {row['speed']:.2f}x ({row['slowest']:.2f}-{row['fastest']:.2f}), "
        f"{named_ms(row['seconds'])} ms a token"
    )


def _costs(costs: Mapping[str, Any]) -> str:
    word = f", {1e9 * costs['word']:.3g} ns a word" if costs["word"] else ""
    return (
        f"a token costs {1e3 * costs['outside']:.3g} ms outside of the blocks{word}, "
        f"{1e3 * costs['block']:.3g} ms a block and {1e6 * costs['unit']:.3g} µs each of its "
        f"{costs['width']} units"
    )
