"""The benchmarks' mixture of experts: a dense model split into a stock Mixtral."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return __import__(name)


@pytest.fixture
def dense() -> LlamaForCausalLM:
    """Five blocks, 9 heads over 3 keys, 48 neurons: torch multiplies groups by 16 bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101, hidden_size=36, intermediate_size=48, num_hidden_layers=5,
        num_attention_heads=9, num_key_value_heads=3, head_dim=8, tie_word_embeddings=True,
        max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # or the MLPs would not matter
    return model


@pytest.fixture
def ids_NL() -> Tensor:
    return torch.randint(101, (40, 16), generator=torch.Generator().manual_seed(1))


def test_a_split_of_which_all_is_active_is_the_dense_model(
    dense: LlamaForCausalLM, ids_NL: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = script("make_moe", monkeypatch)
    split = make.Split(experts=3, active=3, tokens=640, sharpness=0.0)
    make.write(make.split_model(dense, ids_NL, split, told=lambda line: None), tmp_path, tmp_path)
    both: Any = MixtralForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    loaded, report = both
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids_NL[:3]).logits, dense(ids_NL[:3]).logits)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        tensor = file.get_tensor("model.layers.4.block_sparse_moe.experts.2.w1.weight")
    assert tensor.shape == (16, 36)
    assert json.loads((tmp_path / "config.json").read_text())["num_local_experts"] == 3


def test_the_refit_and_the_router_are_better_than_chance(
    dense: LlamaForCausalLM, ids_NL: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = script("make_moe", monkeypatch)
    split = make.Split(experts=4, active=2, tokens=640)
    mixture = make.split_model(dense, ids_NL, split, told=lambda line: None)
    unseen = torch.randint(101, (20, 16), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        theirs, fitted = dense(unseen).logits, mixture(unseen).logits
        for block in mixture.model.layers:
            block.mlp.gate.weight.copy_(-block.mlp.gate.weight)  # the experts that matter least
        turned = mixture(unseen).logits
    assert (fitted - theirs).square().mean() < 0.8 * (turned - theirs).square().mean()


def test_clusters_are_equal_and_find_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    split = script("moe_split", monkeypatch)
    generator = torch.Generator().manual_seed(0)
    centres = 5 * torch.randn(3, 8, generator=generator)
    features = centres.repeat(7, 1) + 0.1 * torch.randn(21, 8, generator=generator)
    clusters = split.equal_clusters(features, 3, seed=0).view(7, 3)
    assert (clusters == clusters[0]).all()
    assert sorted(clusters[0].tolist()) == [0, 1, 2]
    crowded = torch.cat([features[::3], features[::3] + 0.01, features[1::3]])
    assert torch.bincount(split.equal_clusters(crowded, 3, seed=0)).tolist() == [7, 7, 7]
    with pytest.raises(ValueError, match="do not divide"):
        split.equal_clusters(features, 4, seed=0)


def test_ridge_is_least_squares_on_weighted_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    split = script("moe_split", monkeypatch)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(90, 5, generator=generator), torch.randn(90, 3, generator=generator)
    weight = torch.rand(90, generator=generator)
    y = x @ torch.randn(5, 3, generator=generator) + 0.1 * y
    root = weight.sqrt()[:, None]
    naive = torch.linalg.lstsq(root * x, root * y).solution
    torch.testing.assert_close(split.ridge(x, y, 0.0, weight), naive)
    solved, strength = split.centred_ridge(x, y, weight, (0.0, 10.0))
    assert strength == 0.0
    torch.testing.assert_close(solved, naive)
    other, strength = split.centred_ridge(x, torch.cat([y[:67], -y[67:]]), weight, (0.0, 10.0))
    assert strength == float("inf")  # what the first tokens say is wrong of the last
    assert not other.any()


def test_losses_are_those_of_stock(
    dense: LlamaForCausalLM, ids_NL: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, healing = script("make_moe", monkeypatch), script("moe_heal", monkeypatch)
    mixture = make.mixture_of(dense, make.Split(experts=4, active=2, tokens=640))
    text, _ = healing.losses(mixture, ids_NL[:4])
    torch.testing.assert_close(text, mixture(ids_NL[:4], labels=ids_NL[:4]).loss)
