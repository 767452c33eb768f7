"""Views of views: what is stacked gives what is done in one go, or by way of the disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import naive
from places import place
from shearling.engine.stream import BlockStream
from shearling.engine.views.cut import cut_view
from shearling.engine.views.masked import MaskedTensors, masked_logits
from shearling.engine.views.rotated import norms_of, turn
from shearling.engine.walk import logits_of
from shearling.model.checkpoint import Checkpoint
from shearling.model.tensors import StoredTensors
from shearling.pruning.cut import cut
from shearling.table.values import Keep
from tiny_cuts import AXES, prepared, random_keep, relative, sizes_of, tokens

Models = Callable[[str], Path]


def logits(checkpoint: Checkpoint, ids_BS: Tensor) -> Tensor:
    with torch.inference_mode():
        return logits_of(BlockStream(checkpoint, place(False)), ids_BS)


def rotated(checkpoint: Checkpoint) -> Checkpoint:
    """In a random basis of its stream, read through it."""
    norms = norms_of(checkpoint.layout)
    assert norms is not None
    width = checkpoint.shape["hidden"]
    draw = torch.randn(
        width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    )
    gains = dict(checkpoint.read(norms.names(checkpoint.shape["layers"])))
    basis_DD, _ = torch.linalg.qr(draw)
    return turn(checkpoint, norms, basis_DD, {name: gain.double() for name, gain in gains.items()})


def on_disk(checkpoint: Checkpoint, directory: Path) -> Checkpoint:
    """The same model, but that its tensors lie in a file as they are read."""
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint.read(checkpoint.dtypes)}
    file = directory / "read.safetensors"
    save_file(tensors, file)
    return dataclasses.replace(
        checkpoint, tensors=StoredTensors(dict.fromkeys(checkpoint.dtypes, file))
    )


def test_a_cut_of_a_view_is_one_cut(models: Models, variant: str, tmp_path: Path) -> None:
    """Widths in one step and blocks and tokens in the other, against the cut of all that is."""
    checkpoint, keep = prepared(models, variant, AXES)
    widths = {axis: keep.model[axis] for axis in ("hidden",) if axis in keep.model}
    blocks = {
        axis: tuple(
            kept[keep.model["layers"].index(i)] if i in keep.model["layers"] else kept[0]
            for i in range(checkpoint.shape["layers"])
        )
        for axis, kept in keep.blocks.items()
    }
    first = cut_view(checkpoint, Keep(widths, blocks))
    rest = {axis: kept for axis, kept in keep.model.items() if axis not in widths}
    stacked, once = cut_view(first, Keep(rest)), cut_view(checkpoint, keep)
    assert (stacked.shape, stacked.layout, stacked.dtypes) == (once.shape, once.layout, once.dtypes)
    assert stacked.raw == once.raw
    expected = dict(once.read(once.dtypes))
    found = dict(stacked.read(once.dtypes))
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    written = cut(first, Keep(rest), tmp_path / "out")
    stored = load_file(written.path / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored.items())
    ids_BS, _ = tokens(keep, checkpoint.shape["vocab"])
    assert torch.equal(logits(stacked, ids_BS), logits(once, ids_BS))


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "qwen3", "phi3"])
@pytest.mark.parametrize("axes", [AXES, ("layers", "heads", "kv_heads", "mlp")], ids=str)
def test_a_masked_rotated_model_is_the_rotated_one_masked(
    models: Models, variant: str, axes: tuple[str, ...], tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(models(variant))
    keep = random_keep(checkpoint, sizes_of(variant, axes))
    turned = rotated(checkpoint)
    _, ids_BS = tokens(keep, checkpoint.shape["vocab"])
    found = masked_logits(turned, keep, ids_BS)
    assert torch.equal(found, masked_logits(on_disk(turned, tmp_path), keep, ids_BS))
    if "hidden" not in axes:  # no basis of the stream matters to heads, neurons and blocks
        expected = naive.masked_logits(checkpoint.path, keep, ids_BS)
        assert relative(found, expected) < 1e-5
        assert relative(masked_logits(checkpoint, Keep(), ids_BS), expected) > 1e-2
    result = logits(cut_view(turned, keep), tokens(keep, checkpoint.shape["vocab"])[0])
    assert relative(result, found) < 1e-4
    assert relative(logits(turned, ids_BS), logits(checkpoint, ids_BS)) < 1e-4


def test_a_masked_cut_is_the_written_cut_masked(models: Models, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(models("gemma2"))
    first, then = Keep({"layers": (0, 2, 3)}), Keep({"hidden": tuple(range(32))})
    written = cut(checkpoint, first, tmp_path / "out")
    ids_BS, _ = tokens(then, checkpoint.shape["vocab"])
    found = masked_logits(cut_view(checkpoint, first), then, ids_BS)
    assert torch.equal(found, masked_logits(written, then, ids_BS))
    assert relative(found, naive.masked_logits(written.path, then, ids_BS)) < 1e-5


def test_a_view_has_its_source_s_fingerprint(models: Models) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    view = cut_view(cut_view(checkpoint, Keep({"layers": (0, 2, 3)})), Keep({"layers": (1, 2)}))
    assert view.fingerprint == checkpoint.fingerprint
    assert (checkpoint.source, view.path) == (None, checkpoint.path)
    assert view.source is not None
    assert view.source.source is checkpoint
    with pytest.raises(AssertionError, match="as they are read"):
        print(view.files)


def test_what_a_removed_block_held_cannot_be_read_masked(models: Models) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    expanded = checkpoint.layout.cut(Keep({"layers": (0, 2)}), checkpoint.shape)
    masked = MaskedTensors(checkpoint.tensors, expanded, checkpoint.family)
    name = "model.layers.{}.mlp.down_proj.weight"
    assert [each for each, _ in masked.read([name.format(2)])] == [name.format(2)]
    with pytest.raises(KeyError):
        list(masked.read([name.format(1)]))
