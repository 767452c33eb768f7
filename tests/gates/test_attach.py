"""A gated model computes what the cut of its folded weights computes, on every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from shearling.gates.attach import attach
from shearling.gates.bank import GateBank
from shearling.gates.folding import through
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.cut import cut
from shearling.table.values import Shape

TOLERANCE = 1e-5


def smaller(checkpoint: Checkpoint) -> Shape:
    """A legal shape that is smaller on as many axes as the family allows."""
    sizes = {"mlp": 31, "hidden": 28}
    if "kv_heads" in checkpoint.shape:
        sizes |= {"kv_heads": 2, "heads": 4}
    if checkpoint.family.model_type in ("gpt_neox", "opt"):
        sizes |= {"hidden": 28, "heads": 7}
    if checkpoint.family.model_type == "gemma2" or checkpoint.family.model_type == "gemma3_text":
        sizes |= {"hidden": 32}
    if checkpoint.family.additive(checkpoint.config):
        sizes["layers"] = 3
    return checkpoint.shape.with_(**sizes)


def random_gates(bank: GateBank, seed: int) -> None:
    """Random parameters; the settled gates, neither 0 nor 1 where they are open, are set."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for a in bank.log_alpha.values():
            a.copy_(torch.randn(a.shape, generator=generator))
        bank.set({k: v.detach() for k, v in bank.settled(bank.targets()).items()})


def loaded(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()


@pytest.mark.parametrize("seed", [0, 1])
@torch.inference_mode()
def test_gated_logits_are_the_cut_model_s(
    models: Callable[[str], Path], variant: str, seed: int, ids: torch.Tensor, tmp_path: Path
) -> None:
    source = Checkpoint.open(models(variant))
    after = smaller(source)
    source.family.check(source.config, after)
    bank = GateBank(source.layout, source.shape, after)
    random_gates(bank, seed)
    gated = loaded(source.path)
    attach(source, gated, bank)
    result = cut(through(source, bank), bank.keep(), tmp_path / "cut")
    assert result.shape == after
    expected, found = gated(ids).logits, loaded(result.path)(ids).logits
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    stock = loaded(source.path)(ids).logits
    assert (stock - expected).abs().max() > 100 * TOLERANCE * expected.abs().max()
