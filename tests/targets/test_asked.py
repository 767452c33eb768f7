"""What targets are read as, and memory counted beside a stock model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.targets.asked import (
    TargetLoad,
    Targets,
    footprint,
    parse_footprint,
    parse_latency,
    parse_speed,
)


def test_numbers_are_read() -> None:
    assert parse_speed("1.3x") == 1.3
    assert parse_latency("20ms") == parse_latency("0.02s") == 0.02
    whole = 10**10
    assert parse_footprint("8GB", whole) == 8 * 10**9
    assert parse_footprint("512MiB", whole) == 512 * 2**20
    assert parse_footprint("0.29x", 100) == 29


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "no target was given"),
        ({"speed": "1.0x"}, "above 1"),
        ({"speed": "fast"}, "--speed 'fast'"),
        ({"speed": "1.3"}, "such as 1.3x"),
        ({"latency": "20"}, "such as 20ms"),
        ({"latency": "0ms"}, "--latency '0ms'"),
    ],
)
def test_what_is_no_target(asked: dict[str, str], said: str) -> None:
    with pytest.raises(ShearlingError, match=said):
        Targets(**asked)


@pytest.mark.parametrize(
    ("load", "said"),
    [({"engine": "onnx"}, "one of transformers, llama.cpp, vllm"), ({"batch": 0}, "batch is 0")],
)
def test_what_is_no_load(load: dict, said: str) -> None:
    with pytest.raises(ShearlingError, match=said):
        Targets(speed="1.2x", load=TargetLoad(**load))


@pytest.mark.parametrize("text", ["9GB", "2x", "0x", "8", "GB"])
def test_what_is_no_footprint(text: str) -> None:
    with pytest.raises(ShearlingError, match="--footprint"):
        parse_footprint(text, 8 * 10**9)


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "gemma3", "opt", "qwen3_moe"])
def test_memory_is_that_of_a_stock_model_and_its_cache(models, variant: str) -> None:
    """Weights as they are stored, and every number of the cache after ``context`` tokens."""
    batch, context = 2, 6  # shorter than every window
    stock = AutoModelForCausalLM.from_pretrained(models(variant))
    weights = {p.data_ptr(): p.numel() * p.element_size() for p in stock.parameters()}
    cache: Any = DynamicCache(config=stock.config)
    stock(torch.ones(batch, context, dtype=torch.long), past_key_values=cache)
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    source = Checkpoint.open(models(variant))
    load = TargetLoad(batch=batch, context=context)
    assert footprint(source, source.shape, load) == sum(weights.values()) + 2 * kept
