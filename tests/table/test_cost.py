"""Costs against what torch counts and what transformers holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from shearling.model.checkpoint import Checkpoint
from shearling.table.cost import flops_per_token, kv_cache_bytes, parameters
from shearling.table.values import Shape

Models = Callable[[str], Path]

# Every block attends to everything, so that the cache holds every token.
FULL_ATTENTION = (
    "llama",
    "llama-tied",
    "llama-biases",
    "qwen2-tied",
    "qwen3",
    "gpt_neox",
    "gpt_neox-serial",
    "opt",
    "opt-projected",
    "opt-bare",
)


def counted(config: Any, ids: Tensor) -> int:
    """Operations torch counts in a forward pass, rotary tables left out."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(input_ids=ids, use_cache=False)
    by_module = counter.get_flop_counts()
    rotary = sum(
        sum(flops.values()) for name, flops in by_module.items() if name.endswith("rotary_emb")
    )
    return counter.get_total_flops() - rotary


def test_operations_are_those_torch_counts(models: Models, variant: str, ids: Tensor) -> None:
    """Eager attention multiplies whole squares: every token with a context of the sequence."""
    checkpoint = Checkpoint.open(models(variant))
    batch, length = 2, ids.shape[1]
    each = flops_per_token(checkpoint.layout, checkpoint.shape, length)
    assert batch * length * each == counted(checkpoint.config, ids[:batch])


def test_operations_without_context_are_two_for_each_weight_of_a_product(models: Models) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    layout, shape = checkpoint.layout, checkpoint.shape
    norms, embedding = (2 * 5 + 1) * 36, 101 * 36
    assert flops_per_token(layout, shape) == 2 * (layout.count(shape) - norms - embedding)
    # Two products of attention, two operations each, over 9 heads of width 6 in 5 blocks.
    added = flops_per_token(layout, shape, 100) - flops_per_token(layout, shape, 99)
    assert added == 2 * 2 * 9 * 6 * 5


def test_a_tied_head_costs_what_a_free_one_does(models: Models) -> None:
    checkpoint = Checkpoint.open(models("qwen2-tied"))
    free = Checkpoint.open(models("qwen2"))
    assert checkpoint.shape == free.shape
    costs = [flops_per_token(c.layout, c.shape, 10) for c in (checkpoint, free)]
    assert costs[0] == costs[1]
    assert parameters(free.layout, free.shape) - parameters(checkpoint.layout, free.shape) == (
        101 * 36
    )


@pytest.mark.parametrize("variant", FULL_ATTENTION)
def test_the_cache_is_what_transformers_holds(models: Models, variant: str, ids: Tensor) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint.open(models(variant))
    model: Any = AutoModelForCausalLM.from_pretrained(models(variant), dtype=torch.float32)
    with torch.no_grad():
        cache = model.eval()(input_ids=ids[:1], use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_cache_bytes(checkpoint.layout, checkpoint.shape, ids.shape[1], itemsize=4) == held


def test_the_cache_in_closed_form() -> None:
    grouped = Shape({"layers": 5, "heads": 9, "kv_heads": 3, "head_dim": 6})
    assert kv_cache_bytes(None, grouped, 1) == 2 * 5 * 3 * 6 * 2
    ungrouped = Shape({"layers": 5, "heads": 9, "head_dim": 6})
    assert kv_cache_bytes(None, ungrouped, 7, itemsize=4) == 2 * 5 * 9 * 6 * 7 * 4
