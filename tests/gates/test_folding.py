"""Folded tensors under other views."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from places import place
from shearling.engine.stream import BlockStream
from shearling.engine.views.cut import cut_view
from shearling.engine.views.masked import masked_logits
from shearling.engine.walk import logits_of
from shearling.gates.bank import GateBank
from shearling.gates.folding import through
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.cut import cut


@pytest.mark.parametrize("variant", ["llama", "gemma2", "phi3", "opt"])
@torch.inference_mode()
def test_a_cut_of_a_folded_model(
    models: Callable[[str], Path], variant: str, ids: torch.Tensor, tmp_path: Path
) -> None:
    """Read through both, written, or masked, it is the same model."""
    source = Checkpoint.open(models(variant))
    sizes = {"hidden": 28, "heads": 7, "mlp": 31} if variant == "opt" else {"hidden": 27, "mlp": 31}
    bank = GateBank(source.layout, source.shape, source.shape.with_(**sizes))
    generator = torch.Generator().manual_seed(3)
    for a in bank.log_alpha.values():
        a.copy_(torch.randn(a.shape, generator=generator))
    folded, keep = through(source, bank), bank.keep()
    plain = dict(folded.read(folded.dtypes))
    bank.set({axis: values.detach() for axis, values in bank.settled(bank.targets()).items()})
    view = cut_view(folded, keep)  # by the gates in use when it is read
    written = cut(folded, keep, tmp_path / "out")
    stored = load_file(written.path / "model.safetensors")
    found = dict(view.read(stored))
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())
    unfolded = dict(cut_view(source, keep).read(stored))
    assert any(not torch.equal(found[name], unfolded[name]) for name in found)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in source.read(plain))
    logits = logits_of(BlockStream(view, place(False)), ids)
    expected = masked_logits(folded, keep, ids)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert view.fingerprint == folded.fingerprint == source.fingerprint
