"""Gemma 4 with experts beside the MLP: cut on every axis and repaired; stock models under hooks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

import naive
from places import place
from shearling.engine.branches import branches, gain_behind
from shearling.engine.stream import BlockStream
from shearling.engine.views.masked import masked_logits
from shearling.engine.walk import logits_of
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.choose import keep_units
from shearling.pruning.cut import cut
from shearling.pruning.plan import parse_shape
from shearling.repair.refit import refit
from shearling.scoring.score_experts import score_experts
from shearling.scoring.score_units import score_units
from shearling.ship.computes import check_counted
from shearling.table.values import Keep
from shearling.train.adapters import adapted_rows
from tiny_cuts import relative

Models = Callable[[str], Path]
LAYERS = (0, 3, 4)
CHANNELS = tuple(sorted(Random(1).sample(range(36), 24)))
EXPERTS = ((0, 2, 3), (1, 2, 4), (0, 1, 4))
NEURONS = (tuple(range(13)), tuple(range(20, 33)), tuple(range(7, 20)))


@pytest.fixture
def source(models: Models) -> Checkpoint:
    return Checkpoint.open(models("gemma4-experts"))


def every_axis() -> Keep:
    """Three of five blocks, three experts in each with 8 neurons, and some of all else."""
    inside = tuple(tuple(20 * e + i for e in kept for i in range(12, 20)) for kept in EXPERTS)
    return Keep(
        {"layers": LAYERS, "hidden": CHANNELS, "vocab": tuple(range(71))},
        {"experts": EXPERTS, "expert_mlp": inside, "mlp": NEURONS},
    )


def over(kept: list[int]) -> Any:
    """A hook that puts in the place of a norm's output that over some channels, in double."""

    def hook(norm: Any, args: Any, _: Tensor) -> Tensor:
        x = args[0].double()[..., kept]
        out = torch.zeros_like(args[0])
        scale = norm.weight.double()[kept] if norm.with_scale else 1.0
        out[..., kept] = (x * scale / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()).float()
        return out

    return hook


def unwanted(kept: tuple[int, ...]) -> Any:
    """A hook on a router's product that gives none of the others a chance."""

    def hook(_: Any, args: Any, logits: Tensor) -> Tensor:
        return logits.index_fill(-1, torch.tensor([e for e in range(5) if e not in kept]), -1e30)

    return hook


@torch.no_grad()
def by_hand(path: Path, keep: Keep, ids: Tensor) -> Tensor:
    """Logits of the stock source: norms over survivors, and neurons that write nothing."""
    model, kept = naive.stock(path), list(keep.model["hidden"])
    model.model.embed_tokens.weight[:, [d for d in range(36) if d not in kept]] = 0
    for name, norm in model.named_modules():
        if type(norm).__name__ == "Gemma4RMSNorm" and "self_attn" not in name:
            norm.register_forward_hook(over(kept))
    blocks = naive.blocks(model)
    for at, number in enumerate(keep.model["layers"]):
        block: Any = blocks[number]
        block.mlp.down_proj.weight[:, [i for i in range(50) if i not in keep.blocks["mlp"][at]]] = 0
        block.router.proj.register_forward_hook(unwanted(keep.blocks["experts"][at]))
        for e in range(5):
            inside = [i for i in range(20) if 20 * e + i not in keep.blocks["expert_mlp"][at]]
            block.experts.down_proj[e][:, inside] = 0
    for number in set(range(5)) - set(keep.model["layers"]):
        blocks[number] = naive.Skip()
    return model(input_ids=ids, use_cache=False).logits[..., : len(keep.model["vocab"])]


@torch.no_grad()
def test_a_cut_of_every_axis_is_the_source_masked(
    source: Checkpoint, ids: Tensor, tmp_path: Path
) -> None:
    ids, keep = 3 + ids % 68, every_axis()
    result = cut(source, keep, tmp_path / "out")
    proof = json.loads((result.path / "shearling.json").read_text())["proof"]
    assert proof["max_relative_difference"] < 1e-5
    expected = by_hand(source.path, keep, ids)
    stock = naive.accounted(result.path)
    assert relative(stock(input_ids=ids, use_cache=False).logits, expected) < 1e-5
    assert relative(masked_logits(source, keep, ids, place=place()), expected) < 1e-5
    whole = naive.stock(source.path)(input_ids=ids, use_cache=False).logits
    assert relative(whole[..., :71], expected) > 1e-3
    raw = json.loads((result.path / "config.json").read_text())
    sizes = raw["num_experts"], raw["moe_intermediate_size"], raw["intermediate_size"]
    assert sizes == (3, 8, 13)
    assert raw["top_k_experts"] == 2
    assert result.parameters == sum(p.numel() for p in stock.parameters()) + len(LAYERS)
    naive.check_cache(stock, ids[:2])
    for resident in (True, False):
        states = logits_of(BlockStream(result, place(resident)), ids)
        assert relative(states, expected) < 1e-5


@torch.no_grad()
def test_its_block_has_three_branches(source: Checkpoint, ids: Tensor) -> None:
    """What the norms behind them give, factors and all, is what the stock block adds."""
    model: Any = naive.stock(source.path)
    block: Any = naive.blocks(model)[1]
    seen: dict[str, Tensor] = {}
    halves = branches(source, 1)
    assert [half.axis for half in halves] == ["heads", "mlp", "experts"]
    gains = {half.axis: gain_behind(block, half) for half in halves}
    for half in halves[1:]:
        writer = block.get_submodule(half.writer)
        writer.register_forward_hook(lambda m, a, out, n=half.axis: seen.update({n: out}))
    block.post_feedforward_layernorm.register_forward_hook(
        lambda m, args, out: seen.update(joined=args[0], added=out)
    )
    model(input_ids=ids[:2])
    given: dict[str, Tensor] = {}
    size = seen["joined"].square().mean(-1, keepdim=True).add(1e-6).sqrt()
    for half in halves[1:]:
        out = seen[half.axis].view(seen["joined"].shape)
        gain = gains[half.axis]
        assert gain is not None
        given[half.axis] = out / out.square().mean(-1, keepdim=True).add(1e-6).sqrt() * gain / size
    assert relative(given["mlp"] + given["experts"], seen["added"]) < 1e-4


def drawn(rows: int) -> Tensor:
    return torch.randint(3, 101, (rows, 24), generator=torch.Generator().manual_seed(rows))


def errors(checkpoint: Checkpoint, cuts: list[Path]) -> list[float]:
    """Mean square difference of logits on text that no repair saw."""
    fresh = drawn(12)
    with torch.no_grad():
        logits = [naive.stock(p)(input_ids=fresh).logits for p in (checkpoint.path, *cuts)]
    return [float((other - logits[0]).square().mean()) for other in logits[1:]]


def test_experts_and_mlp_are_repaired_together(source: Checkpoint, tmp_path: Path) -> None:
    stream, ids_NS = BlockStream(source, place(False)), drawn(48)
    after = source.shape.with_(experts=4, mlp=30)
    scores = score_experts(stream, "reap", ids_NS[:4])
    scores |= score_units(stream, "flap", ids_NS[:4], ["mlp"])
    keep = keep_units(scores, source.layout, source.shape, after, tuple(range(5)))
    repair = refit(stream, keep, ids_NS, tmp_path, final_norm=False)
    axes = [step.axis for step in repair.steps]
    assert axes == ["heads", "mlp", "experts"] * 5
    assert all(step.error_after <= step.error_before for step in repair.steps)
    assert any(step.error_after < 0.9 * step.error_before for step in repair.steps[2::3])
    assert any("mlp.down_proj" in name for name in repair.replaced)
    assert any("experts.down_proj" in name for name in repair.replaced)
    assert not any("router" in name for name in repair.replaced)
    plain = cut(source, keep, tmp_path / "plain")
    result = cut(source, keep, tmp_path / "out", replaced=repair.replaced)
    before, repaired = errors(source, [plain.path, result.path])
    assert repaired < 0.95 * before


def test_what_is_counted_and_refused(source: Checkpoint) -> None:
    layout, shape = source.layout, source.shape
    one = (20 + 20) * 36 + 36 * 20  # numbers in an expert's matrices
    assert layout.count(shape, active=True) == layout.count(shape) - 5 * 3 * one
    fewer = layout.count(shape) - layout.count(shape.with_(experts=3))
    assert fewer == 5 * 2 * (one + 36 + 1)  # its row of the router, and its scale
    with pytest.raises(ShearlingError, match="router sends every token to 2 experts"):
        parse_shape("experts=1", source)
    with pytest.raises(ShearlingError, match="never tried what llama.cpp makes of .* gemma4_text"):
        check_counted(source)
    rows = {row.name.split(".", 3)[3] for row in adapted_rows(source)}
    assert not any("experts" in name or "router" in name for name in rows)
    assert "mlp.down_proj.weight" in rows
