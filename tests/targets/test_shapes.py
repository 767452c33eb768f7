"""Models of random weights load in stock transformers, in the shape asked for."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from shearling.model.checkpoint import Checkpoint
from shearling.targets.shapes import middle_removed, write_random


@pytest.mark.parametrize(
    ("variant", "sizes"),
    [
        ("llama", {"layers": 3, "mlp": 32}),
        ("llama-tied", {"mlp": 40, "vocab": 60}),
        ("gemma3", {"layers": 2, "mlp": 32}),
        ("qwen3_next", {"layers": 3}),
        ("qwen3_moe", {"layers": 4, "expert_mlp": 8}),
    ],
)
def test_a_random_model_has_the_shape(models, tmp_path, variant: str, sizes: dict) -> None:
    source = Checkpoint.open(models(variant))
    shape = source.shape.with_(**sizes)
    write_random(source, shape, tmp_path / "model")
    assert Checkpoint.open(tmp_path / "model").shape == shape
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    counted = source.layout.keeping(middle_removed(source, shape["layers"])).count(shape)
    assert sum(parameter.numel() for parameter in model.parameters()) == counted


def test_a_run_in_the_middle_goes(models) -> None:
    assert middle_removed(Checkpoint.open(models("llama")), 2) == (0, 4)
    assert middle_removed(Checkpoint.open(models("llama")), 5) == (0, 1, 2, 3, 4)
