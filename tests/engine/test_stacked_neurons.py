"""Neurons removed from experts that lie in one tensor, others in each, against stock models.

The reference is a stock model whose last matrices are zeroed by hand where neurons are removed:
gpt-oss has them inputs first, with gate and up interleaved, Granite outputs first.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import naive
from places import place
from shearling.engine.stream import BlockStream
from shearling.engine.views.cut import cut_view
from shearling.engine.views.masked import masked_logits
from shearling.engine.walk import logits_of
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.choose import keep_units
from shearling.pruning.cut import cut
from shearling.pruning.plan import parse_shape
from shearling.repair.refit import refit
from shearling.scoring.score_experts import score_experts
from shearling.table.values import Keep
from tiny_cuts import relative

Models = Callable[[str], Path]
STACKED = ("gpt_oss", "granitemoe")
EXPERTS, WIDTH, LEFT = 5, 20, 8


def kept_neurons(blocks: int, seed: int = 4) -> list[list[list[int]]]:
    """By block and expert, other neurons in each."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [sorted(torch.randperm(WIDTH, generator=generator)[:LEFT].tolist()) for _ in range(EXPERTS)]
        for _ in range(blocks)
    ]


def keep_of(neurons: list[list[list[int]]], experts: tuple[int, ...] | None = None) -> Keep:
    some = tuple(range(EXPERTS)) if experts is None else experts
    units = tuple(tuple(e * WIDTH + i for e in some for i in block[e]) for block in neurons)
    kept = {} if experts is None else {"experts": (experts,) * len(neurons)}
    return Keep({}, kept | {"expert_mlp": units})


def module_of(block: Any) -> Any:
    (experts,) = (m for m in block.modules() if type(m).__name__.endswith("Experts"))
    return experts


@torch.no_grad()
def silent(path: Path, variant: str, neurons: list[list[list[int]]]) -> Any:
    """The stock source, what removed neurons write set to zero by hand."""
    model = naive.stock(path)
    for block, kept in zip(naive.blocks(model), neurons, strict=True):
        down = module_of(block).down_proj
        for expert, some in enumerate(kept):
            for neuron in set(range(WIDTH)) - set(some):
                columns = down[expert] if variant == "gpt_oss" else down[expert].T
                columns[neuron] = 0
    return model


@pytest.mark.parametrize("variant", STACKED)
@torch.no_grad()
def test_a_stock_model_without_them_says_the_same(
    models: Models, variant: str, ids: Tensor, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(models(variant))
    neurons = kept_neurons(checkpoint.shape["layers"])
    keep = keep_of(neurons)
    expected = silent(checkpoint.path, variant, neurons)(input_ids=ids).logits
    result = cut(checkpoint, keep, tmp_path / "out")
    stock = naive.stock(result.path)
    assert module_of(naive.blocks(stock)[0]).down_proj.shape.numel() == EXPERTS * LEFT * 36
    assert relative(stock(input_ids=ids).logits, expected) < 1e-5
    assert relative(masked_logits(checkpoint, keep, ids), expected) < 1e-5
    view = BlockStream(cut_view(checkpoint, keep), place(False))
    assert relative(logits_of(view, ids), expected) < 1e-5
    assert relative(naive.stock(checkpoint.path)(input_ids=ids).logits, expected) > 1e-3
    manifest = json.loads((result.path / "shearling.json").read_text())
    assert manifest["keep"]["expert_mlp"] == [list(units) for units in keep.blocks["expert_mlp"]]


@pytest.mark.parametrize("variant", STACKED)
@torch.no_grad()
def test_every_expert_keeps_its_own(models: Models, variant: str, tmp_path: Path) -> None:
    """Tensors of the result, number by number, where experts go as well."""
    checkpoint = Checkpoint.open(models(variant))
    neurons, some = kept_neurons(checkpoint.shape["layers"]), (0, 2, 4)
    result = cut(checkpoint, keep_of(neurons, some), tmp_path / "out")
    pairs = zip(
        naive.blocks(naive.stock(checkpoint.path)), naive.blocks(naive.stock(result.path)),
        strict=True,
    )  # fmt: skip
    for number, (before, after) in enumerate(pairs):
        source, cut_down = module_of(before), module_of(after)
        for target, expert in enumerate(some):
            for place_of, i in enumerate(neurons[number][expert]):
                if variant == "gpt_oss":  # gate and up of a neuron are neighbours
                    here, there = 2 * place_of, 2 * i
                    joined = cut_down.gate_up_proj[target], source.gate_up_proj[expert]
                    assert torch.equal(
                        joined[0][:, here : here + 2], joined[1][:, there : there + 2]
                    )
                    biases = cut_down.gate_up_proj_bias[target], source.gate_up_proj_bias[expert]
                    assert torch.equal(biases[0][here : here + 2], biases[1][there : there + 2])
                    down = cut_down.down_proj[target], source.down_proj[expert]
                else:
                    gate_up = cut_down.gate_up_proj[target], source.gate_up_proj[expert]
                    assert torch.equal(gate_up[0][place_of], gate_up[1][i])
                    assert torch.equal(gate_up[0][LEFT + place_of], gate_up[1][WIDTH + i])
                    down = cut_down.down_proj[target].T, source.down_proj[expert].T
                assert torch.equal(down[0][place_of], down[1][i])


@pytest.mark.parametrize("variant", STACKED)
@torch.no_grad()
def test_they_are_scored_chosen_cut_and_repaired(
    models: Models, variant: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(models(variant))
    generator = torch.Generator().manual_seed(3)
    ids_NS = torch.randint(3, 101, (48, 24), generator=generator)
    fresh = torch.randint(3, 101, (12, 24), generator=generator)
    stream = BlockStream(checkpoint, place(False))
    scores = score_experts(stream, "reap", ids_NS[:4], ["experts", "expert_mlp"])
    after = parse_shape("experts=4,expert_mlp=8", checkpoint)
    layers = tuple(range(checkpoint.shape["layers"]))
    keep = keep_units(scores, checkpoint.layout, checkpoint.shape, after, layers)
    by_expert = [
        {tuple(i % WIDTH for i in units[n * LEFT : (n + 1) * LEFT]) for n in range(4)}
        for units in keep.blocks["expert_mlp"]
    ]
    assert all(len(different) == 4 for different in by_expert)
    (tmp_path / "solved").mkdir()
    repair = refit(stream, keep, ids_NS, tmp_path / "solved")
    plain = cut(checkpoint, keep, tmp_path / "plain")
    result = cut(checkpoint, keep, tmp_path / "out", replaced=repair.replaced)
    assert result.shape == after
    source = naive.stock(checkpoint.path)(input_ids=fresh).logits
    errors = [
        float((naive.stock(model.path)(input_ids=fresh).logits - source).square().mean())
        for model in (plain, result)
    ]
    assert errors[1] < 0.95 * errors[0]
