"""What a model's manifests say of how it came from another: which blocks stand for which."""

from __future__ import annotations

from collections.abc import Iterator

from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.model.manifest import MANIFEST, ModelManifest


def blocks_in(checkpoint: Checkpoint, ancestor: Checkpoint) -> tuple[int, ...] | None:
    """For each block of a model, its number in a model that it was made from.

    Returns:
        None where the manifests do not lead to ``ancestor``.
    """
    blocks = tuple(range(checkpoint.shape["layers"]))
    if checkpoint.fingerprint == ancestor.fingerprint:
        return blocks
    for manifest in _chain(checkpoint):
        kept = manifest.layers
        if kept is not None:
            if max(blocks, default=-1) >= len(kept):
                raise ShearlingError(
                    f"{checkpoint.path / MANIFEST} keeps {len(kept)} blocks of "
                    f"{manifest.source.name}, but the model made from it has more; remove that "
                    "file, or name the source itself."
                )
            blocks = tuple(kept[block] for block in blocks)
        if manifest.source.fingerprint == ancestor.fingerprint:
            return blocks
    return None


def final_weights(checkpoint: Checkpoint) -> dict[str, float] | None:
    """The domain weights that the last training in a model's lineage ended with, if any did."""
    weights = (manifest.final_weights for manifest in _chain(checkpoint))
    return next((one for one in weights if one), None)


def _chain(checkpoint: Checkpoint) -> Iterator[ModelManifest]:
    """The manifests of a model and of what it was made from, the newest first."""
    manifest = ModelManifest.load(checkpoint.path)
    return iter(()) if manifest is None else manifest.lineage(checkpoint.path / MANIFEST)
