"""Mixtures of experts: cut, masked, scored and repaired, against stock models under hooks."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import naive
from places import place
from shearling.engine.experts import decided
from shearling.engine.stream import BlockStream
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.model.inspect import inspect, lines
from shearling.pruning.choose import keep_units
from shearling.pruning.cut import cut
from shearling.pruning.plan import parse_shape, shape_for
from shearling.repair.refit import refit
from shearling.scoring.score_experts import score_experts
from shearling.table.axes import units_of
from shearling.table.values import Keep
from tiny_cuts import relative
from tiny_models import KIN, MIXTURES

Models = Callable[[str], Path]
LAYERS = (0, 2, 3, 4)


@pytest.fixture(params=[name for name in MIXTURES if name not in KIN])
def mixture(request: pytest.FixtureRequest) -> str:
    return request.param


def random_keep(checkpoint: Checkpoint, *axes: str) -> Keep:
    """Fewer blocks, all but one of the experts, 8 of the neurons of each, fewer channels."""
    shape, random = checkpoint.shape, Random(5)
    layers = LAYERS if "layers" in axes else tuple(range(5))
    experts = [draw(random, checkpoint) for _ in layers]
    blocks: dict[str, tuple[tuple[int, ...], ...]] = {"experts": tuple(experts)}
    if "expert_mlp" in axes:
        width = shape["expert_mlp"]
        blocks["expert_mlp"] = tuple(
            tuple(e * width + i for e in kept for i in sorted(random.sample(range(width), 8)))
            for kept in experts
        )
    model: dict[str, tuple[int, ...]] = {"layers": layers} if "layers" in axes else {}
    if "hidden" in axes:
        model["hidden"] = tuple(sorted(random.sample(range(shape["hidden"]), 24)))
    return Keep(model, blocks)


def draw(random: Random, checkpoint: Checkpoint) -> tuple[int, ...]:
    """All experts but one, of every group where there are groups."""
    groups = checkpoint.shape.get("expert_groups", 1)
    each = checkpoint.shape["experts"] // groups
    gone = {group * each + random.randrange(each) for group in range(groups)}
    return tuple(e for e in range(checkpoint.shape["experts"]) if e not in gone)


def routers(model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    for number, block in enumerate(naive.blocks(model)):
        for module in block.modules():
            if type(module).__name__.endswith("Router"):
                yield number, module


@contextmanager
def unwanted(model: nn.Module, gone: dict[int, list[int]]) -> Generator[None]:
    """Routers that believe some experts' logits, and biases, to be minus infinity."""
    handles = []
    linear = nn.functional.linear
    inside: list[int] = []

    def masked(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = linear(x, weight, bias)
        if inside:
            out = out.clone()
            out[..., gone[inside[-1]]] = -torch.inf
        return out

    def leave(*_: object) -> None:
        inside.pop()

    biases = []
    for number, router in routers(model):
        for name, bias in (*router.named_parameters(), *router.named_buffers()):
            if name.endswith("e_score_correction_bias"):  # what is added after a softmax or sigmoid
                biases.append((bias, bias.clone()))
                bias[..., gone.get(number, [])] = -torch.inf
        handles.append(router.register_forward_pre_hook(lambda *_, n=number: inside.append(n)))
        handles.append(router.register_forward_hook(leave))
    nn.functional.linear = masked  # ty: ignore[invalid-assignment]
    try:
        yield
    finally:
        nn.functional.linear = linear
        for bias, kept in biases:
            bias.copy_(kept)
        for handle in handles:
            handle.remove()


@torch.no_grad()
def test_a_model_without_experts_is_one_whose_router_does_not_want_them(
    models: Models, mixture: str, ids: Tensor, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(models(mixture))
    keep = random_keep(checkpoint)
    result = cut(checkpoint, keep, tmp_path / "out")
    source = naive.stock(checkpoint.path)
    assert checkpoint.parameters == sum(p.numel() for p in unique(source))
    everyone = range(checkpoint.shape["experts"])
    gone = {
        b: [e for e in everyone if e not in kept] for b, kept in enumerate(keep.blocks["experts"])
    }
    with unwanted(source, gone):
        expected = source(input_ids=ids).logits
    assert relative(naive.stock(result.path)(input_ids=ids).logits, expected) < 1e-5
    assert relative(source(input_ids=ids).logits, expected) > 1e-3


def unique(model: Any) -> Iterator[Tensor]:
    yield from model.parameters()
    for name, buffer in model.named_buffers():
        if name.endswith(("e_score_correction_bias", "layer_scalar")):
            yield buffer


# The width of their experts cannot be cut: what is left of the other cuts is the second one.
OF_FIXED_EXPERTS = (
    "glm4_moe", "deepseek_v3", "deepseek_v3-moonlight", "glm4_moe_lite", "ernie4_5_moe",
)  # fmt: skip
AXES = [("expert_mlp",), ("layers", "hidden"), ("layers", "hidden", "expert_mlp")]
CUTS = [
    (mixture, axes)
    for mixture in MIXTURES
    for axes in (AXES[1:2] if mixture in OF_FIXED_EXPERTS else AXES)
]


@pytest.mark.parametrize(("mixture", "axes"), CUTS, ids=str)
def test_cuts_of_several_axes_are_proved(
    models: Models, mixture: str, axes: tuple[str, ...], tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(models(mixture))
    fixed = {axis.name for axis in checkpoint.layout.axes if axis.rigid}
    assert ("expert_mlp" in fixed) == (mixture in OF_FIXED_EXPERTS)
    if mixture in ("olmoe", "qwen2_moe"):  # the width of a head follows from that of the stream
        fixed.add("hidden")
    axes = tuple(axis for axis in axes if axis not in fixed)
    result = cut(checkpoint, random_keep(checkpoint, *axes), tmp_path / "out")
    proof = json.loads((result.path / "shearling.json").read_text())["proof"]
    assert proof["passed"]
    assert proof["loaded_with"] == "AutoModelForCausalLM"
    assert proof["max_relative_difference"] < 1e-5
    changed = {a for a in result.shape if result.shape[a] != checkpoint.shape[a]}
    assert changed == {"experts", *axes}
    naive.check_cache(naive.stock(result.path), torch.arange(3, 8)[None])


@torch.no_grad()
def heard(model: Any, ids: Tensor) -> dict[int, tuple[Tensor, Tensor, Tensor, Any, Tensor, Tensor]]:
    """Block -> what enters its experts, weights, choice, module, output, the state behind."""
    by_block: dict[int, list[Any]] = {}
    for number, block in enumerate(naive.blocks(model)):

        def state(_: Any, args: Any, out: Any, number: int = number) -> None:
            by_block.setdefault(number, []).append(out[0] if isinstance(out, tuple) else out)

        for module in block.modules():
            if type(module).__name__.endswith("Experts"):

                def note(module: Any, args: Any, out: Any, number: int = number) -> None:
                    by_block[number] = [args[0], args[2], args[1], module, out]

                module.register_forward_hook(note)
        block.register_forward_hook(state)
    model(input_ids=ids)
    return {n: (*values,) for n, values in by_block.items() if len(values) == 6}


def counting(block: Any, out: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """How much each token counts (T), and each channel of what the experts give (D)."""
    if not hasattr(block, "post_feedforward_layernorm_2"):
        return 1 / state.square().sum(-1), torch.ones(out.shape[-1])
    behind = block.post_feedforward_layernorm_2, block.post_feedforward_layernorm
    return 1 / out.square().sum(-1), behind[0].weight * behind[1].weight


def by_hand(module: Any, e: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What enters an expert's last matrix, what it gives, and that matrix (D, K)."""
    if not hasattr(module, "limit"):
        gate, up = (module.gate_up_proj[e] @ x).chunk(2)
        a = module.act_fn(gate) * up
        return a, module.down_proj[e] @ a, module.down_proj[e]
    both = x @ module.gate_up_proj[e] + module.gate_up_proj_bias[e]
    gate, up = both[::2].clamp(max=module.limit), both[1::2].clamp(-module.limit, module.limit)
    a = (up + 1) * gate / (1 + torch.exp(-module.alpha * gate))
    return a, a @ module.down_proj[e] + module.down_proj_bias[e], module.down_proj[e].T


@torch.no_grad()
def test_scores_are_what_a_loop_over_tokens_gives(
    models: Models, mixture: str, ids: Tensor
) -> None:
    checkpoint, ids = Checkpoint.open(models(mixture)), ids[:3]
    stream = BlockStream(checkpoint, place(False))
    scores = {
        by: score_experts(stream, by, ids, ["experts", "expert_mlp"])
        for by in ("frequency", "ean", "reap", "reroute")
    }
    model = naive.stock(checkpoint.path)
    count, width = checkpoint.shape["experts"], checkpoint.shape["expert_mlp"]
    chosen_by = {}
    for block, (x, weights, chosen, module, given, state) in heard(model, ids).items():
        chosen_by[block] = chosen
        expected = {by: [0.0] * count for by in ("frequency", "ean", "reap")}
        energy = torch.zeros(count, width)
        w, gain = counting(naive.blocks(model)[block], given, state.flatten(0, 1))
        for t, (experts, gates) in enumerate(zip(chosen.tolist(), weights.tolist(), strict=True)):
            for e, g in zip(experts, gates, strict=True):
                a, out, columns = by_hand(module, e, x[t])
                length = float(out.norm())
                expected["frequency"][e] += 1
                expected["ean"][e] += length
                expected["reap"][e] += g * length
                energy[e] += w[t] * (g * a).square() * (gain[:, None] * columns).square().sum(0)
        expected["reap"] = [
            r / max(1, f) for r, f in zip(expected["reap"], expected["frequency"], strict=True)
        ]
        for by, row in expected.items():
            assert list(scores[by]["experts"].rows[block]) == pytest.approx(row, rel=1e-4)
        neurons = torch.tensor(scores["reap"]["expert_mlp"].rows[block]).view(count, width)
        assert relative(neurons, energy) < 1e-4
    whole = dict(naive_outputs(models(mixture), ids, {}))
    for block, states in whole.items():
        for e in (0, count - 1):
            lost = dict(naive_outputs(models(mixture), ids, {block: [e]}))[block]
            w, gain = counting(naive.blocks(model)[block], *states)
            w *= (chosen_by[block] == e).any(-1)
            expected_lost = float((w * (gain * (lost[0] - states[0])).square().sum(-1)).sum())
            found = scores["reroute"]["experts"].rows[block][e]
            assert found == pytest.approx(expected_lost, rel=1e-3, abs=1e-7)


@torch.no_grad()
def naive_outputs(
    path: Path, ids: Tensor, gone: dict[int, list[int]]
) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """Block -> what its experts give (T, D), and the state behind it (T, D)."""
    model, outputs = naive.stock(path), {}
    for number, block in enumerate(naive.blocks(model)):
        for module in block.modules():
            if type(module).__name__.endswith("Experts"):

                def note(_: Any, args: Any, out: Any, number: int = number) -> None:
                    outputs[number] = [out]

                def state(_: Any, args: Any, out: Any, number: int = number) -> None:
                    out = out[0] if isinstance(out, tuple) else out
                    outputs[number].append(out.flatten(0, 1))

                module.register_forward_hook(note)
                block.register_forward_hook(state)
    everyone = {number: gone.get(number, []) for number, _ in enumerate(naive.blocks(model))}
    with unwanted(model, everyone):
        model(input_ids=ids)
    yield from ((number, (o[0], o[1])) for number, o in outputs.items())


@torch.no_grad()
def test_a_repair_brings_the_stream_nearer(models: Models, mixture: str, tmp_path: Path) -> None:
    """On tokens that it never saw, too, and it tells the errors that there are."""
    checkpoint = Checkpoint.open(models(mixture))
    generator = torch.Generator().manual_seed(3)
    ids_NS = torch.randint(3, 101, (48, 24), generator=generator)
    fresh = torch.randint(3, 101, (12, 24), generator=generator)
    stream = BlockStream(checkpoint, place(False))
    keep = random_keep(checkpoint)
    repair = refit(stream, keep, ids_NS, tmp_path)
    assert [s.axis for s in repair.steps if s.axis == "experts"]
    for step in repair.steps:
        assert step.error_after <= step.error_before
    plain = cut(checkpoint, keep, tmp_path / "plain")
    result = cut(checkpoint, keep, tmp_path / "out", replaced=repair.replaced)
    source = naive.stock(checkpoint.path)(input_ids=fresh).logits
    errors = [
        float((naive.stock(model.path)(input_ids=fresh).logits - source).square().mean())
        for model in (plain, result)
    ]
    assert errors[1] < 0.95 * errors[0]
    replaced = {name for name in repair.replaced if "_attn." not in name}
    writers = ("down_proj", ".w2.", "output_linear", "norm.weight")
    assert any("down_proj" in n or ".w2." in n or "output_linear" in n for n in replaced)
    assert all(any(writer in name for writer in writers) for name in replaced)


def test_a_budget_takes_experts_first(models: Models, mixture: str) -> None:
    checkpoint = Checkpoint.open(models(mixture))
    count, layout = checkpoint.shape["experts"], checkpoint.layout
    after = shape_for(checkpoint, layout.count(checkpoint.shape) - 1)
    assert after == checkpoint.shape.with_(experts=after["experts"])
    assert after["experts"] < count
    total = layout.count(checkpoint.shape, active=True)
    active = shape_for(checkpoint, int(0.8 * total), active=True)
    assert layout.count(active, active=True) <= 0.8 * total
    assert active["experts"] == count
    facts = inspect(checkpoint)
    assert facts["active_parameters"] == total < facts["parameters"]
    router = next(module for _, module in routers(naive.stock(checkpoint.path)))
    assert facts["experts_per_token"] == getattr(router, "top_k", 2)
    # Two of DeepSeek's three groups are picked, by their best two experts each.
    fewest = 6 if mixture == "deepseek_v3" else getattr(router, "top_k", 2)
    assert facts["fewest_experts"] == fewest
    assert f"at least {fewest} stay" in "\n".join(lines(facts))


def test_units_of_experts_are_counted_through(models: Models) -> None:
    checkpoint = Checkpoint.open(models("mixtral"))
    assert units_of("expert_mlp", checkpoint.shape) == 5 * 20
    scores = score_experts(
        BlockStream(checkpoint, place(False)), "reap", torch.randint(3, 101, (4, 9)),
        ["experts", "expert_mlp"],
    )  # fmt: skip
    after = checkpoint.shape.with_(experts=3, expert_mlp=8)
    keep = keep_units(scores, checkpoint.layout, checkpoint.shape, after, tuple(range(5)))
    assert checkpoint.layout.cut(keep, checkpoint.shape).after == after
    rows = scores["expert_mlp"].rows
    for block, (experts, neurons) in enumerate(
        zip(keep.blocks["experts"], keep.blocks["expert_mlp"], strict=True)
    ):
        for place_of, e in enumerate(experts):
            best = sorted(range(20), key=lambda i: -rows[block][20 * e + i])[:8]
            kept = neurons[8 * place_of : 8 * place_of + 8]
            assert {i - 20 * e for i in kept} == set(best)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("experts=1", "experts=1 cannot be written: the router sends every token to 2 experts"),
        ("experts=6", "between 1 and the source's 5"),
        ("expert_mlp=10", "multiple of 8; the nearest that can: expert_mlp=8"),
        ("mlp=8", "has no axis 'mlp'"),
    ],
)
def test_what_no_router_can_do(models: Models, text: str, sentence: str) -> None:
    with pytest.raises(ShearlingError, match=sentence):
        parse_shape(text, Checkpoint.open(models("mixtral")))


def test_one_block_of_each_kind_stays(models: Models) -> None:
    checkpoint = Checkpoint.open(models("qwen3_moe-mixed"))
    with pytest.raises(
        ShearlingError, match=r"of the kind dense has to stay; keep one of \[0, 3\]"
    ):
        checkpoint.layout.cut(Keep({"layers": (1, 2, 4)}), checkpoint.shape)


def test_a_router_s_answer_in_either_order() -> None:
    logits_TE, weights_TP = torch.randn(3, 4), torch.rand(3, 2)
    chosen_TP = torch.tensor([[0, 1], [2, 3], [1, 0]])
    for out in ((logits_TE, weights_TP, chosen_TP), (chosen_TP, weights_TP, logits_TE)):
        weights, chosen = decided(out)
        assert weights is weights_TP
        assert chosen is chosen_TP
