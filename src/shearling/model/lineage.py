"""What a model's manifests say of how it came from another: which blocks stand for which."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shearling.model.checkpoint import Checkpoint
from shearling.model.manifest import read_manifest


def blocks_in(checkpoint: Checkpoint, ancestor: Checkpoint) -> tuple[int, ...] | None:
    """For each block of a model, its number in a model that it was made from.

    Returns:
        None where the manifests do not lead to ``ancestor``.
    """
    blocks = tuple(range(checkpoint.shape["layers"]))
    if checkpoint.fingerprint == ancestor.fingerprint:
        return blocks
    for manifest in _chain(checkpoint):
        kept = (manifest.get("keep") or {}).get("layers")
        if kept is not None:
            blocks = tuple(kept[block] for block in blocks)
        if manifest["source"]["fingerprint"] == ancestor.fingerprint:
            return blocks
    return None


def final_weights(checkpoint: Checkpoint) -> dict[str, float] | None:
    """The domain weights that the last training in a model's lineage ended with, if any did."""
    found = (manifest.get("final_weights") for manifest in _chain(checkpoint))
    return next((weights for weights in found if weights), None)


def _chain(checkpoint: Checkpoint) -> Iterator[dict[str, Any]]:
    """The manifests of a model and of what it was made from, the newest first."""
    manifest = read_manifest(checkpoint.path)
    while manifest is not None:
        yield manifest
        manifest = manifest.get("parent")
