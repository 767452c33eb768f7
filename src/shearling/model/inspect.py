"""What a model is, in figures that need no weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shearling.files.sizes import in_bytes, scaled
from shearling.model.checkpoint import Checkpoint
from shearling.model.manifest import MANIFEST, ModelManifest, describe, read_manifest
from shearling.model.wrapping import Wrapping
from shearling.table.axes import EXPERTS
from shearling.table.cost import flops_per_token, kv_cache_bytes, state_bytes
from shearling.table.layout import Layout
from shearling.table.values import Shape

CONTEXT = 1024


def inspect(checkpoint: Checkpoint) -> dict[str, Any]:
    """Shape, exact parameter counts, operations, memory and lineage of a model."""
    layout, shape = checkpoint.layout, checkpoint.shape
    rows = layout.block_rows()
    return describe(checkpoint) | {
        "path": str(checkpoint.path),
        "architecture": checkpoint.family.model_type,
        "dtypes": sorted(set(checkpoint.dtypes.values())),
        "tied_embeddings": any(row.tied_to for row in layout.rows),
        "parameters_in_blocks": sum(layout.numbers(row, shape) for row in rows),
        "parameters_per_block": layout.count_block(shape),
        **_mixture(checkpoint),
        "flops_per_token": flops_per_token(layout, shape, CONTEXT),
        "flops_context": CONTEXT,
        "kv_cache_bytes_per_token": kv_cache_bytes(layout, shape, 1),
        "state_bytes": state_bytes(layout, shape),
        "blocks_by_kind": dict(Counter(layout.kinds)),
        "prunable_axes": [
            axis.name
            for axis in layout.axes
            if not axis.rigid and axis.name not in checkpoint.family.frozen
        ],
        "frozen_axes": dict(checkpoint.family.frozen),
        "wrapper": _around(checkpoint.wrapping),
        "manifest": read_manifest(checkpoint.path),
    }


def _mixture(checkpoint: Checkpoint) -> dict[str, Any]:
    """What only models with experts have."""
    layout, shape = checkpoint.layout, checkpoint.shape
    if not layout.routed:
        return {}
    return {
        "active_parameters": layout.count(shape, active=True),
        "experts_per_token": layout.routed,
        "fewest_experts": _fewest_experts(checkpoint),
    }


def _fewest_experts(checkpoint: Checkpoint) -> int:
    """How many of a block's experts have to stay for the router to have its choice."""
    rules, shape = checkpoint.family.legality(checkpoint.config), checkpoint.shape
    return next(
        count
        for count in range(1, shape[EXPERTS] + 1)
        if all(rule.holds(shape.with_(experts=count)) for rule in rules)
    )


def _around(wrapping: Wrapping | None) -> dict[str, Any] | None:
    """What lies around the language model, if something does."""
    if wrapping is None:
        return None
    return {
        "architecture": wrapping.kind.model_type,
        "tensors": len(wrapping.others),
        "bytes": wrapping.bytes,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The same for a person."""
    count, blocks = found["parameters"], found["parameters_in_blocks"]
    per_block = found["parameters_per_block"]
    most = "" if per_block * found["shape"]["layers"] == blocks else "at most "
    operations = scaled(found["flops_per_token"], "FLOP", 3)
    text = [
        f"{found['name']} ({found['architecture']}, {'/'.join(found['dtypes'])})",
        f"  shape        {', '.join(f'{axis}={size}' for axis, size in found['shape'].items())}",
        f"  parameters   {count:,} ({blocks:,} in blocks, {most}{per_block:,} each)",
        f"  on disk      {in_bytes(found['bytes'])}",
        f"  per token    {operations} at {CONTEXT} tokens of context",
        f"  KV cache     {found['kv_cache_bytes_per_token'] / 1024:.2f} KiB a token in 16 bits",
        f"  fingerprint  {found['fingerprint'][:16]}",
    ]
    kinds = found["blocks_by_kind"]
    if found["state_bytes"]:
        text[6:6] = [f"  state        {found['state_bytes'] / 1024:.2f} KiB a sequence besides"]
    if kinds and "active_parameters" not in found:
        each = (f"{count} {kind.replace('_', ' ')}" for kind, count in kinds.items())
        text[2:2] = [f"  blocks       {', '.join(each)}"]
    if "active_parameters" in found:
        text[3:3] = [
            f"  experts      {found['shape']['experts']} in a block, of which at least "
            f"{found['fewest_experts']} stay; {found['experts_per_token']} for a token: "
            f"{found['active_parameters']:,} parameters active"
            + "".join(f"; {count} blocks {kind}" for kind, count in kinds.items())
        ]
    text.append(f"  can be cut   {', '.join(found['prunable_axes'])}")
    if found["wrapper"] is not None:
        around = found["wrapper"]
        text.append(
            f"  inside       a {around['architecture']}, whose other {around['tensors']} tensors "
            f"({in_bytes(around['bytes'])}) are copied as they are"
        )
    for why in dict.fromkeys(found["frozen_axes"].values()):
        axes = [axis for axis, reason in found["frozen_axes"].items() if reason == why]
        text.append(f"  stays        {', '.join(axes)}: {why}")
    if found["tied_embeddings"]:
        text.append("  embeddings   tied: one storage, counted once")
    file = Path(found["path"]) / MANIFEST
    if found["manifest"] is not None:
        for manifest in ModelManifest.from_json(found["manifest"], file).lineage(file):
            source, kept = manifest.source, manifest.layers
            size = manifest.source_parameters or source.parameters or 0
            text.append(
                f"  made from    {source.name} {source.fingerprint[:16]}, {size:,} parameters"
                + (f", blocks {_ranges(kept)} kept" if kept else "")
            )
    return text


def comparison(
    source: Checkpoint, shape: Shape, kept: Sequence[int] | None = None
) -> dict[str, Any]:
    """Before and after, without running anything.

    Args:
        source: the model.
        shape: sizes after the cut.
        kept: the blocks that stay, if they are known; of blocks of several kinds, the heaviest are
            counted if not.
    """
    layout = left = source.layout
    fewer = bool(layout.kinds) and shape["layers"] < source.shape["layers"]
    if fewer:
        left = layout.heaviest(source.shape) if kept is None else layout.keeping(kept)
    before, after = layout.count(source.shape), left.count(shape)
    flops = [flops_per_token(*of, CONTEXT) for of in ((layout, source.shape), (left, shape))]
    most = "at most " if fewer and kept is None else ""
    return {
        "figures": {
            "source_shape": dict(source.shape),
            "shape": dict(shape),
            "source_parameters": before,
            "parameters": after,
        },
        "text": [
            f"blocks      {source.shape['layers']} -> {shape['layers']}",
            f"parameters  {before:,} -> {most}{after:,} ({after / before - 1:+.1%})",
            *_active((layout, left), source.shape, shape),
            f"per token   {scaled(flops[0], 'FLOP', 3)} -> {scaled(flops[1], 'FLOP', 3)} "
            f"({flops[1] / flops[0] - 1:+.1%}) at {CONTEXT} tokens of context",
        ],
    }


def _active(layouts: tuple[Layout, Layout], *shapes: Shape) -> list[str]:
    if not layouts[0].routed:
        return []
    counts = [of.count(shape, active=True) for of, shape in zip(layouts, shapes, strict=True)]
    return [f"active      {counts[0]:,} -> {counts[1]:,} ({counts[1] / counts[0] - 1:+.1%})"]


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
