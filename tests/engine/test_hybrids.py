"""Blocks of several kinds, attention and linear attention: against stock models under hooks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import naive
from places import check_walk, place
from shearling.engine.stream import BlockStream
from shearling.engine.views.masked import masked_logits
from shearling.errors import ShearlingError
from shearling.gates.attach import attach
from shearling.gates.bank import GateBank
from shearling.gates.folding import through
from shearling.gates.learn import check as learn_check
from shearling.gates.options import LearnOptions
from shearling.model.checkpoint import Checkpoint
from shearling.model.inspect import comparison, inspect, lines
from shearling.model.memory import loaded_bytes
from shearling.pruning.choose import keep_layers, keep_units
from shearling.pruning.cut import cut
from shearling.pruning.plan import parse_shape, shape_for
from shearling.pruning.size import Size
from shearling.repair.refit import refit
from shearling.repair.rotate import rotate
from shearling.scoring.score import protected_blocks, score_tokens
from shearling.scoring.score_units import score_units
from shearling.scoring.scores import Scores
from shearling.table.cost import flops_per_token, kv_cache_bytes, state_bytes
from shearling.table.kinds import lost
from shearling.table.values import Keep
from tiny_cuts import relative
from tiny_models import HYBRIDS, tiny_model

Models = Callable[[str], Path]
LINEAR, FULL = (0, 2, 4), (1, 3)
# Blocks 0, 3 and 4: of linear attention, attention, and linear attention.
KEEP = Keep(
    {"layers": (0, 3, 4), "hidden": tuple(range(3, 27))},
    {
        "heads": ((0, 1, 6, 7), (0, 2, 3, 4), (3, 5, 6, 8)),
        "kv_heads": ((0, 2), (0, 1), (1, 2)),
        "linear_heads": ((0, 2), (0, 1), (1, 2)),
        "mlp": (tuple(range(13)), tuple(range(20, 33)), tuple(range(7, 20))),
    },
)


@pytest.fixture(params=[name for name in HYBRIDS if "moe" not in name])
def hybrid(request: pytest.FixtureRequest) -> str:
    return request.param


@torch.no_grad()
def logits(path: Path, ids: Tensor) -> Tensor:
    return naive.stock(path)(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def test_a_cut_is_the_source_masked(
    models: Models, hybrid: str, ids: Tensor, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(models(hybrid))
    file = load_file(models(hybrid) / "model.safetensors")
    expected = {name: tuple(tensor.shape) for name, tensor in file.items()}
    assert checkpoint.layout.tensors(checkpoint.shape) == expected
    for name, shape in expected.items():  # a block has what its kind has
        assert ".linear_attn." not in name or name.split(".")[2] in "024", shape
    result = cut(checkpoint, KEEP, tmp_path / "out")
    proof = json.loads((result.path / "shearling.json").read_text())["proof"]
    assert proof["max_relative_difference"] < 1e-5
    masked = naive.masked_logits(models(hybrid), KEEP, ids)
    assert relative(masked_logits(checkpoint, KEEP, ids, place=place()), masked) < 1e-5
    assert relative(logits(result.path, ids), masked) < 1e-5
    assert result.layout.kinds == ("linear_attention", "full_attention", "linear_attention")
    raw = json.loads((result.path / "config.json").read_text())
    assert raw["layer_types"] == list(result.layout.kinds)
    each = checkpoint.config.linear_num_value_heads // 3
    assert (raw["linear_num_key_heads"], raw["linear_num_value_heads"]) == (2, 2 * each)
    naive.check_cache(naive.stock(result.path), ids[:2])


def test_block_by_block_it_is_the_stock_model(models: Models, hybrid: str, ids: Tensor) -> None:
    check_walk(models(hybrid), ids)


@pytest.mark.parametrize("hybrid", ["qwen3_5"])
def test_units_are_scored_where_they_are(models: Models, hybrid: str, ids: Tensor) -> None:
    """Heads of either kind of attention: energies by hand, and zeros in blocks of the other."""
    checkpoint = Checkpoint.open(models(hybrid))
    stream = BlockStream(checkpoint, place())
    axes = ("mlp", "heads", "kv_heads", "linear_heads", "hidden")
    found = score_units(stream, "energy", ids, axes)
    model, inputs, states = naive.stock(models(hybrid)), {}, {}
    blocks: Any = naive.blocks(model)
    for number, block in enumerate(blocks):
        writer = block.linear_attn.out_proj if number in LINEAR else block.self_attn.o_proj
        writer.register_forward_pre_hook(
            lambda m, args, n=number: inputs.__setitem__(n, (args[0].flatten(0, 1), m.weight))
        )
        block.register_forward_hook(
            lambda _, __, out, n=number: states.__setitem__(n, out.flatten(0, 1))
        )
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for number, (x_TC, weight_OC) in inputs.items():
        axis, other = ("linear_heads", "heads") if number in LINEAR else ("heads", "linear_heads")
        w_T = 1 / states[number].double().square().sum(-1)
        energy_C = (w_T[:, None] * x_TC.double().square()).mean(0)
        expected = (energy_C * weight_OC.detach().double().square().sum(0)).view(
            checkpoint.shape[axis], -1
        )
        assert list(found[axis].rows[number]) == pytest.approx(expected.sum(1).tolist(), rel=1e-4)
        assert set(found[other].rows[number]) == {0.0}
    for by in ("taylor", "magnitude-l1", "obs", "fisher-energy"):
        for axis, scores in score_units(stream, by, ids, axes).items():
            absent = {"heads": LINEAR, "kv_heads": LINEAR, "linear_heads": FULL}.get(axis, ())
            for number, row in enumerate(scores.rows):
                assert (len(set(row)) == 1) == (number in absent), (by, axis)
    after = checkpoint.shape.with_(heads=4, kv_heads=2, linear_heads=2, mlp=8)
    keep = keep_units(found, checkpoint.layout, checkpoint.shape, after, tuple(range(5)))
    assert checkpoint.layout.cut(keep, checkpoint.shape).after == after


@pytest.mark.parametrize("hybrid", ["qwen3_5"])
@torch.no_grad()
def test_a_repair_brings_it_nearer(models: Models, hybrid: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(models(hybrid))
    generator = torch.Generator().manual_seed(3)
    ids_NS = torch.randint(3, 101, (32, 24), generator=generator)
    fresh = torch.randint(3, 101, (12, 24), generator=generator)
    keep = Keep({"layers": (0, 1, 3, 4)}, {"linear_heads": ((0, 2), (0, 1), (1, 2), (0, 1))})
    repair = refit(BlockStream(checkpoint, place(False)), keep, ids_NS, tmp_path)
    axes = [step.axis for step in repair.steps]
    assert axes == ["linear_heads", "mlp", "heads", "mlp", "heads", "mlp", "linear_heads", "mlp"]
    assert all(step.error_after <= step.error_before for step in repair.steps)
    assert any("linear_attn.out_proj" in name for name in repair.replaced)
    plain = cut(checkpoint, keep, tmp_path / "plain")
    result = cut(checkpoint, keep, tmp_path / "out", replaced=repair.replaced)
    source = logits(checkpoint.path, fresh)
    errors = [float((logits(p.path, fresh) - source).square().mean()) for p in (plain, result)]
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("hybrid", ["qwen3_5"])
@torch.no_grad()
def test_a_rotated_stream_is_the_same(hybrid: str, ids: Tensor, tmp_path: Path) -> None:
    """Norms here multiply by 1 + w: gains are folded with it, and written without.

    Stock code runs the delta rule in single precision, whatever the model's type.
    """
    tiny_model(hybrid).double().save_pretrained(tmp_path / "source")
    checkpoint = Checkpoint.open(tmp_path / "source")
    rotate(BlockStream(checkpoint, place()), ids, 24, tmp_path / "turned")
    expected = doubles(checkpoint.path, ids)
    assert relative(doubles(tmp_path / "turned", ids), expected) < 5e-5


@pytest.mark.parametrize("hybrid", ["qwen3_5-tied"])
@torch.no_grad()
def test_a_stream_in_a_subspace_is_cut_to_it(hybrid: str, ids: Tensor, tmp_path: Path) -> None:
    """Norms over fewer channels are widened; epsilon, which they weigh otherwise, is nothing."""
    tiny_model(hybrid).double().save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-7}))
    axes_DK, _ = torch.linalg.qr(torch.randn(36, 24).double())
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    for name, tensor in tensors.items():
        if "embed_tokens" in name:
            tensors[name] = tensor @ axes_DK @ axes_DK.T
        elif name.split(".")[-2] in ("o_proj", "out_proj", "down_proj"):
            tensors[name] = axes_DK @ axes_DK.T @ tensor
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(tmp_path / "source")
    turned = rotate(BlockStream(checkpoint, place()), ids, 24, tmp_path / "turned")
    first = Keep({"hidden": tuple(range(24))})
    expected = doubles(checkpoint.path, ids)
    cut(turned.cuttable, first, tmp_path / "out")
    cut(checkpoint, first, tmp_path / "raw")
    assert relative(doubles(tmp_path / "out", ids), expected) < 1e-4
    assert relative(doubles(tmp_path / "raw", ids), expected) > 0.05


@torch.no_grad()
def doubles(path: Path, ids: Tensor) -> Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    return model.eval()(input_ids=ids, use_cache=False).logits


@torch.inference_mode()
def test_gates_on_heads_of_either_kind(models: Models, ids: Tensor, tmp_path: Path) -> None:
    source = Checkpoint.open(models("qwen3_5"))
    after = source.shape.with_(heads=4, kv_heads=2, linear_heads=2, mlp=31)
    bank = GateBank(source.layout, source.shape, after)
    with torch.no_grad():
        for gates in bank.log_alpha.values():
            gates.copy_(torch.randn(gates.shape, generator=torch.Generator().manual_seed(0)))
        bank.set({axis: gates.detach() for axis, gates in bank.settled(bank.targets()).items()})
    gated: Any = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float64).eval()
    stock = gated(ids).logits
    attach(source, gated, bank)
    result = cut(through(source, bank), bank.keep(), tmp_path / "cut")
    expected = gated(ids).logits
    assert relative(doubles(result.path, ids), expected) < 1e-5
    assert relative(stock, expected) > 1e-3


def test_gates_do_not_choose_blocks_of_several_kinds(models: Models, tmp_path: Path) -> None:
    source = Checkpoint.open(models("qwen3_5"))
    options = LearnOptions.model_validate({"tokens": 1000, "batch": 2, "lr": 1e-3})
    training: Any = SimpleNamespace(source=source, store=None, options=options)
    with pytest.raises(ShearlingError, match=r"blocks of several kinds .linear attention and full"):
        learn_check(training, source.shape.with_(layers=4), tmp_path / "out")


# --- costs ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_is_kept_of_a_sequence(models: Models, hybrid: str, ids: Tensor) -> None:
    """Keys and values grow in two blocks alone; the states of the others do not."""
    checkpoint = Checkpoint.open(models(hybrid))
    layout, shape = checkpoint.layout, checkpoint.shape
    cache = naive.stock(models(hybrid))(input_ids=ids[:1], use_cache=True).past_key_values
    keys = sum(cache.layers[n].keys.nbytes + cache.layers[n].values.nbytes for n in FULL)
    states = sum(
        state.nbytes
        for n in LINEAR
        for held in (cache.layers[n].conv_states, cache.layers[n].recurrent_states)
        for state in held.values()
    )
    assert kv_cache_bytes(layout, shape, ids.shape[1], itemsize=4) == keys
    assert state_bytes(layout, shape, itemsize=4) == states
    facts = inspect(checkpoint)
    assert facts["kv_cache_bytes_per_token"] == keys // 2 // ids.shape[1]
    assert facts["state_bytes"] == states // 2
    text = "\n".join(lines(facts))
    assert "blocks       3 linear attention, 2 full attention" in text
    assert f"state        {states / 2048:.2f} KiB a sequence" in text
    added = flops_per_token(layout, shape, 100) - flops_per_token(layout, shape, 99)
    assert added == 2 * 2 * len(FULL) * 9 * 8


def test_a_budget_holds_whichever_blocks_go(models: Models, hybrid: str) -> None:
    checkpoint = Checkpoint.open(models(hybrid))
    layout, shape = checkpoint.layout, checkpoint.shape
    after = shape_for(checkpoint, int(0.55 * checkpoint.parameters))
    assert after["layers"] < 5
    counts = {
        layout.keeping([b for b in range(5) if b != gone]).count(shape.with_(layers=4))
        for gone in range(5)
    }
    assert max(counts) == layout.heaviest(shape).count(shape.with_(layers=4))
    assert len(counts) == 2
    told = comparison(checkpoint, shape.with_(layers=4))
    assert told["figures"]["parameters"] == max(counts)
    assert "at most" in told["text"][1]
    known = comparison(checkpoint, shape.with_(layers=4), (0, 1, 2, 3))
    assert known["figures"]["parameters"] in counts
    assert "at most" not in known["text"][1]


# --- one block of each kind stays ----------------------------------------------------------------


def scores(*values: float, order: tuple[int, ...] = ()) -> Scores:
    return Scores("by hand", "layers", (values,), removal_order=order)


def test_no_choice_takes_the_last_of_a_kind(models: Models, ids: Tensor) -> None:
    checkpoint = Checkpoint.open(models("qwen3_5"))
    kinds = checkpoint.layout.kinds
    assert lost(kinds, {1, 3}) == "full_attention"
    assert lost(kinds, {0, 2, 4}) == "linear_attention"
    assert lost(kinds, {0, 1, 2}) is None
    low = scores(5, 0, 4, 1, 3)
    assert keep_layers(low, 3).model["layers"] == (0, 2, 4)
    assert keep_layers(low, 3, kinds=kinds).model["layers"] == (0, 2, 3)
    ordered = scores(0, 0, 0, 0, 0, order=(3, 1, 4))
    assert keep_layers(ordered, 2, kinds=kinds).model["layers"] == (1, 2)
    stream = BlockStream(checkpoint, place())
    for by in ("greedy", "repair"):
        found = score_tokens(stream, by, ids, remove=3)
        assert lost(kinds, found.removal_order) is None
        assert keep_layers(found, 2, kinds=kinds)
    with pytest.raises(ShearlingError, match="only 3 are neither protected nor the last of their"):
        keep_layers(low, 1, kinds=kinds)


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        (
            lambda c: Size(remove=(1, 3)).keep_blocks(c),
            r"of the kind full_attention has to stay; keep one of \[1, 3\]",
        ),
        (
            lambda c: parse_shape("layers=1", c),
            "layers=1 cannot be written: its blocks are of 2 kinds .linear attention and full "
            "attention., and one of each stays; the nearest that can: layers=2",
        ),
        (
            lambda c: protected_blocks(c, "greedy", (1, 1), 3),
            "3 of 5 blocks were to be removed, but only 2 are not protected, as one of each kind",
        ),
        (lambda c: parse_shape("linear_heads=4", c), "between 1 and the source's 3"),
        (lambda c: parse_shape("linear_key_dim=4", c), "linear_key_dim .* cannot be cut"),
    ],
)
def test_what_is_refused(models: Models, what: Callable[[Checkpoint], Any], sentence: str) -> None:
    with pytest.raises(ShearlingError, match=sentence):
        what(Checkpoint.open(models("qwen3_5")))


# --- what lies on disk ---------------------------------------------------------------------------


def stacked(path: Path, target: Path) -> Path:
    """As hubs hold Qwen 3.5's experts: those of a block in one tensor, gates above ups."""
    shutil.copytree(path, target)
    tensors = load_file(path / "model.safetensors")
    own = {name: t for name, t in tensors.items() if ".mlp.experts." not in name}
    for block in range(5):
        at = f"model.layers.{block}.mlp.experts"

        def each(name: str, at: str = at) -> list[Tensor]:
            return [tensors[f"{at}.{e}.{name}.weight"] for e in range(5)]

        own[f"{at}.down_proj"] = torch.stack(each("down_proj"))
        both = zip(each("gate_proj"), each("up_proj"), strict=True)
        own[f"{at}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in both])
    save_file(own, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_experts_in_one_tensor_are_read_one_by_one(
    models: Models, ids: Tensor, tmp_path: Path
) -> None:
    apart = Checkpoint.open(models("qwen3_5_moe"))
    joined = Checkpoint.open(stacked(apart.path, tmp_path / "joined"))
    assert joined.dtypes == apart.dtypes
    assert joined.sizes == apart.sizes
    names = list(apart.dtypes)
    wanted = dict(apart.read(names))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in joined.read(names))
    assert joined.fingerprint != apart.fingerprint
    assert loaded_bytes(joined.path) == loaded_bytes(apart.path)
    kept = {"experts": ((0, 2, 3),) * 4}
    results = [
        cut(source, Keep({"layers": (0, 1, 2, 4)}, kept), tmp_path / name)
        for name, source in (("a", apart), ("b", joined))
    ]
    assert torch.equal(logits(results[0].path, ids), logits(results[1].path, ids))
    tensors = load_file(joined.path / "model.safetensors")
    tensors["model.layers.3.mlp.experts.down_proj"] = torch.ones(4, 36, 20)
    save_file(tensors, joined.path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ShearlingError, match=r"down_proj.weight as \[4, 36, 20\]"):
        Checkpoint.open(joined.path)


def test_heads_that_predict_further_are_named(models: Models, tmp_path: Path) -> None:
    path = Path(shutil.copytree(models("qwen3_next"), tmp_path / "source"))
    own = Checkpoint.open(path)
    tensors = load_file(path / "model.safetensors")
    ahead = {"mtp.fc.weight": torch.ones(36, 72), "mtp.norm.weight": torch.ones(36)}
    save_file(tensors | ahead, path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(path)
    assert checkpoint.parameters == own.parameters
    (note,) = checkpoint.notes(checkpoint.shape.with_(layers=4))
    assert note.startswith("the 2 tensors that predict tokens further ahead are not copied")
    assert own.notes(own.shape.with_(layers=4)) == []
    result = cut(checkpoint, Keep({"layers": (0, 1, 2, 3)}), tmp_path / "out")
    assert not any("mtp" in name for name in load_file(result.path / "model.safetensors"))
