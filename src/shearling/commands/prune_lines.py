"""What ``shearling prune`` says: the plan, the result, and the table of several sizes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shearling.commands.options import print_result, warn
from shearling.errors import count_of

if TYPE_CHECKING:
    from shearling.model.checkpoint import Checkpoint
    from shearling.pruning.prune import Pruning
    from shearling.pruning.results import FamilyFile, FamilySize
    from shearling.table.values import Shape


def plan_of(pruning: Pruning, how: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What would be written, as JSON and in lines."""
    from shearling.model.inspect import comparison

    source, after = pruning.source, pruning.wanted.after
    removed = how.get("removed")
    gone = set(removed or ())
    kept = [block for block in range(source.shape["layers"]) if block not in gone]
    plan = comparison(source, after, kept if gone else None)
    text = [f"would remove blocks {', '.join(map(str, removed))}"] if removed else []
    account = pruning.wanted.account
    text += [*_widths(source.shape, after), *plan["text"], *_account_lines(account, source)]
    notes = source.notes(after)
    return {**how, **account, **plan["figures"], "notes": notes}, [*text, *notes]


def print_pruned(source: Checkpoint, output: Path, as_json: bool) -> None:
    """What was made."""
    from shearling.model.inspect import comparison
    from shearling.model.manifest import read_manifest
    from shearling.pruning.settle import only_words
    from shearling.table.values import Shape

    manifest = read_manifest(output) or {}
    options, proof = manifest["options"], manifest["proof"]
    after = Shape(manifest["shape"])
    text = [f"removed blocks {options['removed']}"] if options.get("removed") else []
    compared = comparison(source, after, manifest["keep"].get("layers"))
    text += [*_widths(source.shape, after), *compared["text"]]
    text += _account_lines(options, source)
    text += _rotation_lines(options.get("rotation"))
    repaired = len(manifest.get("repaired", []))
    text.append(_repair_line(options.get("repair"), repaired, only_words(source.shape, after)))
    text += _source_lines(options.get("repair"))
    text.append(
        f"proof of surgery: logits within {proof['max_relative_difference']:.1e} of the source "
        f"with what was removed masked ({proof['loaded_with']})"
    )
    text += source.notes(after)
    print_result(manifest, as_json, [*text, f"wrote {output}"])


def _account_lines(account: Mapping[str, Any], source: Checkpoint) -> list[str]:
    """How a shape came about that was searched for."""
    from shearling.targets.say import target_lines, words_line

    lines = [words_line(account["vocabulary"])] if "vocabulary" in account else []
    if "targets" in account:
        lines += target_lines(account["targets"], source.shape)
    return lines


def _rotation_lines(rotation: dict[str, Any] | None) -> list[str]:
    if not rotation:
        return []
    return [
        f"rotated     into the principal axes: {rotation['kept_energy']:.1%} of the stream's "
        f"energy stays; logits within {rotation['proof']['max_relative_difference']:.1e} of the "
        "source before the cut"
    ]


def _source_lines(repair: dict[str, Any] | None) -> list[str]:
    """What was lost on each of several calibration sources."""
    damages = (repair or {}).get("sources", [])
    width = max((len(one["name"]) for one in damages), default=0)
    return [
        f"held out    {one['name']:<{width}}  perplexity {one['perplexity_before']:.4g} -> "
        f"{one['perplexity_after']:.4g}, {one['divergence']:.3f} nats from the source "
        f"({one['tokens']:,} tokens)"
        for one in damages
    ]


def _repair_line(repair: dict[str, Any] | None, tensors: int, words_alone: bool) -> str:
    """What the repair did; its warnings go to stderr."""
    if not repair and words_alone:
        return "not repaired: only words went; --refit would fit the final norm's gain anew"
    if not repair:
        return "not repaired: --calibration FILE and --refit would solve what is left anew"
    for sentence in repair["warnings"]:
        warn(sentence)
    before = sum(step["error_before"] for step in repair["steps"])
    gone = 1 - sum(step["error_after"] for step in repair["steps"]) / max(before, 1e-300)
    left = "" if repair["final_norm"] else "; the final norm as it was (--no-final-norm)"
    return (
        f"repaired    {count_of(tensors, 'tensor')} on {repair['tokens']:,} tokens in "
        f"{repair['seconds']:.0f} s: {gone:.0%} of the held-out error gone{left}"
    )


def _widths(before: Shape, after: Shape) -> list[str]:
    """Every axis that shrinks, but for the blocks, which are told apart."""
    changed = [axis for axis in after if axis != "layers" and after[axis] < before[axis]]
    return [f"{axis:<11} {before[axis]} -> {after[axis]}" for axis in changed]


def family_lines(family: FamilyFile) -> list[str]:
    """A line for each size, the largest first."""
    whole = family.source.parameters or 0
    rows: list[tuple[str, ...]] = [
        ("size", "parameters", "blocks", "error before", "after", "divergence", "proof")
    ]
    rows.extend(_row(size, whole) for size in family.sizes)
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)) for row in rows]
    return [line.rstrip() for line in lines]


def _row(size: FamilySize, whole: int) -> tuple[str, ...]:
    share = f" ({size.parameters / whole - 1:+.1%})" if whole else ""
    return (
        size.name, f"{size.parameters:,}{share}", f"{size.shape['layers']}",
        *(_figure(value) for value in (size.error_before, size.error_after, size.divergence)),
        _figure(size.proof),
    )  # fmt: skip


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
