"""Gemma 4: heads of two widths, a factor behind every block; against stock models under hooks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import naive
from places import check_walk, place
from shearling.engine.stream import BlockStream
from shearling.engine.views.masked import masked_logits
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.model.inspect import inspect, lines
from shearling.pruning.choose import keep_layers, keep_units
from shearling.pruning.cut import cut
from shearling.pruning.plan import parse_shape
from shearling.repair.refit import refit
from shearling.scoring.score_units import score_units
from shearling.scoring.scores import Scores
from shearling.table.cost import flops_per_token, kv_cache_bytes
from shearling.table.families import FAMILIES
from shearling.table.values import Keep
from tiny_cuts import relative
from tiny_models import OF_TWO_WIDTHS, tiny_config

Models = Callable[[str], Path]
KEEP = Keep(
    {"layers": (0, 3, 4), "hidden": tuple(range(3, 30)), "vocab": tuple(range(71))},
    {"mlp": (tuple(range(13)), tuple(range(20, 33)), tuple(range(7, 20)))},
)


@pytest.fixture(params=list(OF_TWO_WIDTHS))
def gemma(request: pytest.FixtureRequest) -> str:
    return request.param


@torch.no_grad()
def logits(path: Path, ids: Tensor) -> Tensor:
    return naive.stock(path)(input_ids=ids, use_cache=False).logits


def over(kept: list[int]) -> Any:
    """A hook that puts in the place of a norm's output that over some channels, in double."""

    def hook(norm: Any, args: Any, _: Tensor) -> Tensor:
        x = args[0].double()[..., kept]
        out = torch.zeros_like(args[0])
        scale = norm.weight.double()[kept] / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        out[..., kept] = (x * scale).to(out.dtype)
        return out

    return hook


@torch.no_grad()
def by_hand(path: Path, keep: Keep, ids: Tensor) -> Tensor:
    """Logits of the stock source: norms over survivors, neurons and channels that write nothing."""
    model, kept = naive.stock(path), list(keep.model["hidden"])
    for norm in (m for m in model.modules() if type(m).__name__ == "Gemma4RMSNorm"):
        if norm.with_scale and norm.weight.numel() == 36:
            norm.register_forward_hook(over(kept))
    chosen = zip(keep.model["layers"], keep.blocks["mlp"], strict=True)
    for number, neurons in chosen:
        block: Any = naive.blocks(model)[number]
        gone = [i for i in range(50) if i not in neurons]
        block.mlp.down_proj.weight[:, gone] = 0
    embedding = model.model.embed_tokens.weight
    embedding[:, [d for d in range(36) if d not in kept]] = 0
    blocks = naive.blocks(model)
    for number in set(range(5)) - set(keep.model["layers"]):
        blocks[number] = naive.Skip()
    return model(input_ids=ids, use_cache=False).logits[..., : len(keep.model["vocab"])]


@torch.no_grad()
def test_a_cut_is_the_source_masked(
    models: Models, gemma: str, ids: Tensor, tmp_path: Path
) -> None:
    ids = 3 + ids % 68  # kept, and none that generation takes for padding
    checkpoint = Checkpoint.open(models(gemma))
    file = load_file(models(gemma) / "model.safetensors")
    assert checkpoint.layout.tensors(checkpoint.shape) == {
        n: tuple(t.shape) for n, t in file.items()
    }
    assert checkpoint.parameters == sum(tensor.numel() for tensor in file.values())
    result = cut(checkpoint, KEEP, tmp_path / "out")
    proof = json.loads((result.path / "shearling.json").read_text())["proof"]
    assert proof["max_relative_difference"] < 1e-5
    assert proof["loaded_with"] == "AutoModelForCausalLM"
    expected = by_hand(models(gemma), KEEP, ids)
    assert relative(logits(result.path, ids), expected) < 1e-5
    assert relative(masked_logits(checkpoint, KEEP, ids, place=place()), expected) < 1e-5
    assert relative(logits(models(gemma), ids)[..., :71], expected) > 1e-3
    raw = json.loads((result.path / "config.json").read_text())
    assert raw["layer_types"] == ["sliding_attention", "full_attention", "full_attention"]
    assert set(raw["per_layer_config"]) == {"1", "2"}
    naive.check_cache(naive.stock(result.path), ids[:2])


def test_block_by_block_it_is_the_stock_model(models: Models, gemma: str, ids: Tensor) -> None:
    check_walk(models(gemma), ids)


@torch.no_grad()
def test_a_repair_brings_it_nearer(models: Models, gemma: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(models(gemma))
    generator = torch.Generator().manual_seed(3)
    ids_NS = torch.randint(3, 101, (48, 24), generator=generator)
    fresh = torch.randint(3, 101, (12, 24), generator=generator)
    stream = BlockStream(checkpoint, place(False))
    scores = score_units(stream, "flap", ids_NS[:4], ["mlp"])
    after = checkpoint.shape.with_(mlp=30)
    keep = keep_units(scores, checkpoint.layout, checkpoint.shape, after, tuple(range(5)))
    (tmp_path / "solved").mkdir()
    repair = refit(stream, keep, ids_NS, tmp_path / "solved", final_norm=False)
    assert all(step.error_after <= step.error_before for step in repair.steps)
    plain = cut(checkpoint, keep, tmp_path / "plain")
    result = cut(checkpoint, keep, tmp_path / "out", replaced=repair.replaced)
    source = logits(checkpoint.path, fresh)
    errors = [float((logits(m.path, fresh) - source).square().mean()) for m in (plain, result)]
    assert errors[1] < 0.95 * errors[0]


def test_what_is_kept_and_what_is_refused(models: Models, gemma: str) -> None:
    checkpoint = Checkpoint.open(models(gemma))
    layout, shape = checkpoint.layout, checkpoint.shape
    with pytest.raises(ShearlingError, match=r"last_full_attention has to stay; keep one of \[4\]"):
        layout.cut(Keep({"layers": (0, 1, 2)}), shape)
    with pytest.raises(ShearlingError, match="heads of a gemma4_text model cannot be cut"):
        parse_shape("heads=6", checkpoint)
    scores = Scores("x", "layers", ((5.0, 4.0, 3.0, 2.0, 1.0),))
    kept = keep_layers(scores, 3, kinds=layout.kinds).model["layers"]
    assert kept == (0, 1, 4)  # the last one stays, however little it is worth
    text = " ".join(lines(inspect(checkpoint)))
    assert "heads of another width" in text
    groups, wide = (1, 8) if gemma == "gemma4" else (3, 8)
    assert kv_cache_bytes(layout, shape, 10, itemsize=2) == 2 * (2 * 3 * 6 + 3 * groups * wide) * 20
    attention = 2 * 9 * (2 * 6 + 3 * 8) * 7
    assert flops_per_token(layout, shape, 7) == flops_per_token(layout, shape) + 2 * attention


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_kv_shared_layers": 2}, r"read the keys of earlier ones was given \(num_kv_shared"),
        ({"hidden_size_per_layer_input": 4}, "embeddings of their own was given .* Gemma 4 31B"),
        ({"layer_types": ["full_attention"] * 5}, "blocks of full_attention was given"),
    ],
)
def test_other_gemmas_of_this_type(change: dict[str, Any], sentence: str) -> None:
    raw = OF_TWO_WIDTHS["gemma4"][1] | change
    config = type(tiny_config("gemma4"))(**raw)
    with pytest.raises(ShearlingError, match=sentence):
        FAMILIES["gemma4_text"].layout(config)
