"""What shipped recipes leave of the models they name, counted here by the papers' formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen3MoeConfig

from shearling.errors import ShearlingError
from shearling.gates.learn import check_shape
from shearling.model.checkpoint import Checkpoint
from shearling.recipes.read import read_recipe, shipped
from shearling.recipes.schema import GatesMethod, TargetSection
from shearling.recipes.target import size_of
from shearling.table.families import FAMILIES
from shearling.table.values import Shape

_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, vocab_size=32000, tie_word_embeddings=False,
)  # fmt: skip
_QWEN: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "vocab_size": 151936,
    "norm_topk_prob": True,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "meta-llama/Llama-2-7b-hf": _7B,
    "huggyllama/llama-7b": _7B,
    "lmsys/vicuna-7b-v1.3": _7B,
    "HuggingFaceTB/SmolLM2-135M": LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
    ),
    "Qwen/Qwen3-30B-A3B": Qwen3MoeConfig(**_QWEN),
}  # fmt: skip


class NoTensors:
    """A model without weights: counts and shapes ask for none."""


def model_of(name: str) -> Checkpoint:
    config = CONFIGS[name]
    family = FAMILIES[config.model_type]
    return Checkpoint(
        Path(name), config.to_dict(), config, family, family.layout(config), family.shape(config),
        {}, NoTensors(),
    )  # fmt: skip


def left(name: str) -> list[Shape]:
    """The sizes after every cut of a shipped recipe."""
    recipe = read_recipe(name)
    assert recipe.source is not None
    source = model = model_of(recipe.source)
    shapes = []
    for step in recipe.cuts:
        depth_only = getattr(step.method, "kind", "") == "blocks"
        _, after = size_of(step.target, source, model, depth_only=depth_only)
        if isinstance(step.method, GatesMethod):
            check_shape(model, after)
        model = replace(model, shape=after)
        shapes.append(after)
    return shapes


def llama(hidden: int, layers: int, mlp: int, vocab: int = 32000) -> int:
    """Parameters of a Llama with as many key/value heads as heads, untied."""
    block = 4 * hidden**2 + 3 * hidden * mlp + 2 * hidden
    return 2 * vocab * hidden + layers * block + hidden


@pytest.mark.parametrize("name", shipped())
def test_every_target_is_met(name: str) -> None:
    assert left(name)


def test_the_papers_sizes() -> None:
    source = model_of("meta-llama/Llama-2-7b-hf")
    for name, parameters in (
        ("sheared-1.3b", llama(2048, 24, 5504)), ("sheared-2.7b", llama(2560, 32, 6912)),
        ("shortened-cpt", llama(4096, 26, 11008)),
    ):  # fmt: skip
        (after,) = left(name)
        assert source.layout.count(after) == parameters
    assert llama(2048, 24, 5504) == 1_345_423_360  # as published


def test_shares() -> None:
    smol = model_of("HuggingFaceTB/SmolLM2-135M")
    counts = [smol.layout.count(shape) for shape in left("progressive")]
    for count, share in zip(counts, (0.85, 0.72, 0.6), strict=True):
        assert 0.99 * share * smol.parameters < count <= share * smol.parameters
    assert left("experts")[0]["experts"] == 96
    assert left("shortened-cpt-smollm2")[0]["layers"] == 24


def test_whole_blocks_alone() -> None:
    """The most blocks with which the model is no larger, found here by trying."""
    smol = model_of("HuggingFaceTB/SmolLM2-135M")
    _, after = size_of(TargetSection(params="0.7x"), smol, smol, depth_only=True)
    counts = {n: smol.layout.count(smol.shape.with_(layers=n)) for n in range(1, 31)}
    assert after["layers"] == max(n for n in counts if counts[n] <= 0.7 * counts[30])
    assert {axis for axis in after if after[axis] != smol.shape[axis]} == {"layers"}
    with pytest.raises(ShearlingError, match="one block and the embeddings alone have"):
        size_of(TargetSection(params="0.1x"), smol, smol, depth_only=True)
