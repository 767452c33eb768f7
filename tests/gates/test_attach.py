"""A gated model computes what the cut of its folded weights computes, on every family."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import naive
import shearling.gates.attach
from shearling.gates.attach import attach
from shearling.gates.bank import GateBank
from shearling.gates.folding import through
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.cut import cut
from shearling.table.values import Shape
from tiny_models import LEADING

TOLERANCE = 1e-5


def smaller(checkpoint: Checkpoint) -> Shape:
    """A legal shape that is smaller on as many axes as the family allows."""
    sizes = {"mlp": 31, "hidden": 28}
    if "kv_heads" in checkpoint.shape:
        sizes |= {"kv_heads": 2, "heads": 4}
    if checkpoint.family.model_type in ("gpt_neox", "opt"):
        sizes |= {"hidden": 28, "heads": 7}
    if checkpoint.family.model_type in ("olmo2", "olmo3"):  # their heads are normed together
        sizes = {"mlp": 31, "hidden": 28}
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
    return naive.stock(path, torch.float64)


# Other gates at random are tried on one variant of each way to build a block.
SEEDS = [(variant, 0) for variant in LEADING]
SEEDS += [(v, 1) for v in ("llama", "phi3", "gemma3", "granite", "cohere2", "gpt_neox", "opt")]


@pytest.mark.parametrize(("variant", "seed"), SEEDS)
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


# How gradients of several parts add up depends on no family; a batch in one part is tried on few.
PARTS = [(variant, 2, short) for variant in LEADING for short in (False, True)]
PARTS += [(variant, 1, False) for variant in ("llama", "gemma2", "gpt_neox")]


@pytest.mark.parametrize(("variant", "parts", "short"), PARTS)
def test_weights_gated_once_a_step(
    models: Callable[[str], Path], variant: str, parts: int, short: bool, ids: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As on a GPU: the same gradients of weights and gates, in float64.

    Stock RMSNorms round to float32 whatever they are given, and so, with ``short`` norms, which
    do not, that rounding is the difference.
    """
    if not short:
        monkeypatch.setattr(shearling.gates.attach, "_short_rms_norm", stock_norm)
    source = Checkpoint.open(models(variant))
    found: list[dict[str, torch.Tensor]] = []
    for once in (False, True):
        bank = GateBank(source.layout, source.shape, smaller(source))
        random_gates(bank, 0)
        values = {k: v.double().requires_grad_() for k, v in bank.values.items()}
        model = loaded(source.path).requires_grad_(True)
        attach(source, model, bank, once=once)
        bank.set(values)
        bank.fold()
        for part in ids.chunk(parts):
            model(part).logits.square().sum().backward()
        bank.gather()
        gates = {f"gates {k}": v.grad for k, v in values.items()}
        weights = {k: p.grad for k, p in model.named_parameters()}
        found.append({k: g for k, g in (gates | weights).items() if g is not None})
    assert found[0].keys() == found[1].keys()
    assert any(name.startswith("gates") for name in found[0])
    for name, gradient in found[0].items():
        scale = float(gradient.abs().max())
        error = float((found[1][name] - gradient).abs().max())
        assert error <= (1e-4 if short else 1e-9) * scale, name


def stock_norm(module: Any, bank: GateBank, offset: float, h_BSD: torch.Tensor) -> torch.Tensor:
    """The norm as it is computed on a CPU."""
    forward = partial(type(module).forward, module)
    return shearling.gates.attach._live_rms_norm(forward, bank, h_BSD)
