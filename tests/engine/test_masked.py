"""Cuts on every axis: the written model, the masked source and a stock model under hooks agree."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import naive
from places import place
from shearling.engine.views.masked import masked_logits
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.cut import cut
from shearling.pruning.proof import prove
from shearling.table.values import Keep
from tiny_cuts import AXES, PRODUCT, Narrowed, prepared, random_keep, relative, sizes_of, tokens
from tiny_models import LEADING
from tiny_tokenizer import write_llama

Models = Callable[[str], Path]


@torch.no_grad()
def logits(path: Path, ids_BS: Tensor) -> Tensor:
    return naive.stock(path)(input_ids=ids_BS, use_cache=False).logits


def check(checkpoint: Checkpoint, keep: Keep, result: Checkpoint) -> Tensor:
    """Compare a cut with both ways to mask: the proof's, and by hooks on a stock model.

    Returns:
        Logits (2, 17, V) of the latter.
    """
    output = result.path
    ids_BS, source_ids_BS = tokens(keep, checkpoint.shape["vocab"])
    expected = naive.masked_logits(checkpoint.path, keep, source_ids_BS)
    assert relative(logits(result.path, ids_BS), expected) < 1e-5
    proof = json.loads((output / "shearling.json").read_text())["proof"]
    assert proof["max_relative_difference"] < 1e-5
    found = load_file(output / "model.safetensors")
    after = checkpoint.layout.cut(keep, checkpoint.shape).after
    assert checkpoint.layout.count(after) == sum(t.numel() for t in found.values())
    assert checkpoint.layout.tensors(after) == {n: tuple(t.shape) for n, t in found.items()}
    assert result.shape == after
    return expected


# Where a config gives the width of a head, heads go along with the hidden size. Neurons and tokens
# have nothing to do with each other; neurons alone are in test_cut.py.
SINGLE = [
    (variant, axes)
    for variant in LEADING
    for axes in (("hidden",), ("heads",), ("kv_heads",), ("mlp", "vocab"))
    if variant not in PRODUCT or axes not in (("heads",), ("kv_heads",))
]


@pytest.mark.parametrize(("variant", "axes"), SINGLE, ids=str)
def test_one_axis(models: Models, variant: str, axes: tuple[str, ...], tmp_path: Path) -> None:
    checkpoint, keep = prepared(models, variant, axes)
    result = cut(checkpoint, keep, tmp_path / "out")
    check(checkpoint, keep, result)
    assert all(result.shape[axis] < checkpoint.shape[axis] for axis in axes)


def test_all_axes(narrowed: Narrowed, every_variant: str) -> None:
    checkpoint, keep, result = narrowed(every_variant)
    expected = check(checkpoint, keep, result)
    changed = {axis for axis in result.shape if result.shape[axis] != checkpoint.shape[axis]}
    assert changed == set(AXES) & checkpoint.shape.keys()
    streamed = prove(checkpoint, keep, result, place=place(False))
    assert streamed.max_relative_difference < 1e-5
    _, ids_BS = tokens(keep, checkpoint.shape["vocab"])
    assert relative(masked_logits(checkpoint, keep, ids_BS), expected) < 1e-5
    assert relative(masked_logits(checkpoint, Keep(), ids_BS)[..., :60], expected) > 1e-2


CACHED = (
    "llama", "phi3", "gemma3", "gpt_neox", "opt-projected", "smollm3", "ministral3", "olmo3",
    "granite", "granitemoehybrid", "glm4", "cohere2", "exaone4",
)  # fmt: skip


@pytest.mark.parametrize("variant", CACHED)
def test_a_narrow_model_writes_with_its_cache_what_it_writes_without(
    narrowed: Narrowed, variant: str
) -> None:
    _, keep, result = narrowed(variant)
    model = naive.stock(result.path)
    expected = tokens(keep, 101)[0][:, :5]
    for _ in range(6):
        following = model(input_ids=expected, use_cache=False).logits[:, -1].argmax(-1)
        expected = torch.cat([expected, following[:, None]], dim=1)
    model.generation_config.eos_token_id = None
    found = model.generate(expected[:, :5], max_new_tokens=6, do_sample=False, use_cache=True)
    assert torch.equal(found, expected)


def test_a_cut_of_a_cut_is_one_cut(models: Models, tmp_path: Path) -> None:
    """Down to a hidden size that Llama refuses, then on as the Mistral it has become."""
    checkpoint = Checkpoint.open(models("llama"))
    first = cut(checkpoint, Keep({"hidden": tuple(range(1, 32))}), tmp_path / "first")
    assert first.family.model_type == "mistral"
    second = cut(first, Keep({"hidden": tuple(range(0, 31, 2))}), tmp_path / "second")
    once = cut(checkpoint, Keep({"hidden": tuple(range(1, 32, 2))}), tmp_path / "once")
    ids_BS, _ = tokens(Keep(), 101)
    assert torch.equal(logits(second.path, ids_BS), logits(once.path, ids_BS))


@pytest.mark.parametrize(
    ("variant", "hidden", "sentence"),
    [
        ("opt", 24, "nearest that can: hidden=24, heads=6"),
        ("gpt_neox", 33, "nearest that can: hidden=32, heads=8"),
        ("gemma2", 35, "nearest that can: hidden=36, heads=9"),
        ("llama-biases", 35, "nearest that can: hidden=36, heads=9"),
    ],
)
def test_what_cannot_be_written_is_refused_before_any_work(
    models: Models,
    variant: str,
    hidden: int,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(import_module("shearling.pruning.cut"), "new_directory", None)
    keep = Keep({"hidden": tuple(range(hidden))})
    with pytest.raises(ShearlingError, match=sentence):
        cut(Checkpoint.open(models(variant)), keep, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_llama_3_s_rotary_scaling_survives_as_mistral(models: Models, tmp_path: Path) -> None:
    source = Path(shutil.copytree(models("llama-tied"), tmp_path / "source"))
    raw = json.loads((source / "config.json").read_text())
    raw["rope_parameters"] = {
        "rope_type": "llama3",
        "rope_theta": 50.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    }
    (source / "config.json").write_text(json.dumps(raw))
    keep = Keep({"hidden": tuple(range(31))})
    checkpoint = Checkpoint.open(source)
    result = cut(checkpoint, keep, tmp_path / "out")
    check(checkpoint, keep, result)
    assert type(naive.stock(result.path)).__name__ == "MistralForCausalLM"
    unscaled = naive.masked_logits(models("llama-tied"), keep, tokens(keep, 101)[0])
    assert relative(logits(result.path, tokens(keep, 101)[0]), unscaled) > 1e-3


# --- tensors that a repair has solved anew -------------------------------------------------------

_REPAIRED = {
    "llama": ("model.layers.1.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight"),
    "gemma2": (
        "model.layers.2.mlp.down_proj.weight",
        "model.layers.1.post_feedforward_layernorm.weight",
        "model.embed_tokens.weight",
    ),
    "phi3": ("model.layers.0.self_attn.qkv_proj.weight", "model.norm.weight"),
    "gpt_neox": (
        "gpt_neox.layers.0.attention.query_key_value.weight",
        "gpt_neox.layers.2.mlp.dense_4h_to_h.bias",
    ),
    "opt": (
        "model.decoder.layers.1.fc2.weight",
        "model.decoder.layers.0.self_attn_layer_norm.bias",
    ),
    "opt-projected": ("model.decoder.project_in.weight", "model.decoder.project_out.weight"),
}


# In bfloat16 they are rounded as well; that nothing rounds float32 depends on no family.
_TYPES = [(variant, torch.bfloat16) for variant in _REPAIRED]
_TYPES += [(variant, torch.float32) for variant in ("gemma2", "gpt_neox")]


@pytest.mark.parametrize(("variant", "dtype"), _TYPES, ids=str)
def test_replaced_tensors(models: Models, variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """As if the model had been cut and the tensors then put into what was written."""
    naive.stock(models(variant)).to(dtype).save_pretrained(tmp_path / "source")
    checkpoint = Checkpoint.open(tmp_path / "source")
    keep = random_keep(checkpoint, sizes_of(variant, AXES))
    plain = cut(checkpoint, keep, tmp_path / "plain")
    generator = torch.Generator().manual_seed(7)
    sizes = plain.layout.tensors(plain.shape)
    new = {name: torch.randn(sizes[name], generator=generator) for name in _REPAIRED[variant]}
    asked: list[str] = []

    def ask(name: str) -> Tensor:
        asked.append(name)
        return new[name]

    replaced = {name: lambda name=name: ask(name) for name in new}
    result = cut(checkpoint, keep, tmp_path / "out", replaced=replaced, shard_bytes=5000)
    assert sorted(asked) == sorted(new)
    ids_BS, source_ids_BS = tokens(keep, 101)
    model = naive.stock(plain.path)
    state = model.state_dict()
    for name, tensor in new.items():
        state[checkpoint.family.renamed.get(name, name)].copy_(tensor.to(dtype))
    with torch.no_grad():
        expected = model(input_ids=ids_BS, use_cache=False).logits
    assert relative(logits(result.path, ids_BS), expected) < 1e-5
    rounded = {name: tensor.to(dtype) for name, tensor in new.items()}
    masked = masked_logits(checkpoint, keep, source_ids_BS, replaced=rounded)
    assert relative(masked, expected) < 1e-5
    manifest = Checkpoint.open(tmp_path / "out").path / "shearling.json"
    found = json.loads(manifest.read_text())
    assert found["repaired"] == sorted(new)
    assert found["proof"]["max_relative_difference"] < 1e-5
    assert not prove(checkpoint, keep, result).passed, "the source knows nothing of them"
    assert relative(logits(plain.path, ids_BS), expected) > 1e-3, "they change nothing"


def test_a_manifest_without_repairs_names_none(models: Models, tmp_path: Path) -> None:
    result = cut(Checkpoint.open(models("llama")), Keep({"layers": (0,)}), tmp_path / "out")
    assert "repaired" not in json.loads((result.path / "shearling.json").read_text())


def test_replacing_what_is_not_there_is_refused(models: Models, tmp_path: Path) -> None:
    source, keep = Checkpoint.open(models("llama")), Keep({"layers": (0, 4)})
    name = "model.layers.{}.mlp.down_proj.weight"
    with pytest.raises(ShearlingError, match=r"layers\.4\.mlp.* no such tensor"):
        cut(source, keep, tmp_path / "out", replaced={name.format(4): lambda: torch.ones(36, 50)})
    with pytest.raises(ShearlingError, match=r"by a tensor of \[36, 49\].* holds \[36, 50\]"):
        cut(source, keep, tmp_path / "out", replaced={name.format(1): lambda: torch.ones(36, 49)})
    nan = torch.full((36, 50), float("nan"))
    with pytest.raises(ShearlingError, match=r"layers\.1\.mlp.* numbers that are infinite"):
        cut(source, keep, tmp_path / "out", replaced={name.format(1): lambda: nan})
    assert list(tmp_path.iterdir()) == []


# --- the proof can fail --------------------------------------------------------------------------


@pytest.mark.parametrize("axis", AXES[1:])
def test_another_choice_of_units_is_no_proof(narrowed: Narrowed, axis: str) -> None:
    checkpoint, keep, result = narrowed("llama")
    other = random_keep(checkpoint, sizes_of("llama", AXES), seed=1)
    if axis in keep.model:
        wrong = Keep({**keep.model, axis: other.model[axis]}, keep.blocks)
    else:
        both = ("heads", "kv_heads") if axis in ("heads", "kv_heads") else (axis,)
        wrong = Keep(keep.model, {**keep.blocks, **{a: other.blocks[a] for a in both}})
    assert wrong != keep
    assert prove(checkpoint, keep, result).passed
    assert not prove(checkpoint, wrong, result).passed


def test_rounding_is_told_from_faults_in_double_precision(
    narrowed: Narrowed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tolerance is loosened: where rounding may be the cause, it is removed."""
    checkpoint, keep, result = narrowed("llama-tied")
    single = prove(checkpoint, keep, result)
    assert (single.passed, single.computed_in) == (True, "float32")
    monkeypatch.setattr(import_module("shearling.pruning.proof"), "TOLERANCE", 1e-9)
    for stream in (False, True):
        double = prove(checkpoint, keep, result, place=place(not stream))
        assert double.passed
        rounded = single.max_relative_difference > 1e-9  # 3e-6, on the machine of the day
        assert double.computed_in == ("float64" if rounded else "float32")
    wrong = Keep({**keep.model, "layers": (1, 3, 4)}, keep.blocks)
    assert wrong != keep
    assert not prove(checkpoint, wrong, result).passed


def test_gemma_without_its_rescaling_is_refused(models: Models, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(models("gemma2"))
    family = dataclasses.replace(checkpoint.family, rescale=lambda *_: None)
    source = dataclasses.replace(checkpoint, family=family)
    with pytest.raises(ShearlingError, match="proof of surgery failed"):
        cut(source, Keep({"hidden": tuple(range(27))}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_rounding_a_rescaled_norm_is_no_failure(models: Models, tmp_path: Path) -> None:
    """bfloat16 keeps eight bits of Gemma's norms; the proof is of what was written."""
    naive.stock(models("gemma3")).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    source = Checkpoint.open(tmp_path / "source")
    result = cut(source, Keep({"hidden": tuple(range(9, 36))}), tmp_path / "out")
    proof = json.loads((result.path / "shearling.json").read_text())["proof"]
    assert proof["max_relative_difference"] < 1e-5


# --- what lies beside the weights ----------------------------------------------------------------


def test_a_cut_of_the_vocabulary_renumbers_its_files(models: Models, tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source", layers=1)
    (source / "generation_config.json").write_text('{"eos_token_id": [257, 256]}')
    (source / "LICENSE").write_text("mine")
    kept = tuple(i for i in range(260) if i < 258 and i != 3)
    with pytest.raises(ShearlingError, match="token id 3 "):  # a byte: text could not be written
        cut(Checkpoint.open(source), Keep({"vocab": kept}), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    kept = tuple(range(258))  # two rows of padding go
    result = cut(Checkpoint.open(source), Keep({"vocab": kept}), tmp_path / "out")
    assert result.shape["vocab"] == 258
    text = "as ever"
    before, after = Checkpoint.open(source).tokenizer(), result.tokenizer()
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert (result.path / "LICENSE").read_text() == "mine"


def test_ids_move_with_their_tokens(models: Models, tmp_path: Path) -> None:
    source = Path(shutil.copytree(models("llama"), tmp_path / "source"))
    raw = json.loads((source / "config.json").read_text())
    ids = {"pad_token_id": 7, "bos_token_id": 50, "eos_token_id": [100, 50]}
    (source / "config.json").write_text(json.dumps(raw | ids))
    (source / "generation_config.json").write_text(json.dumps(ids))
    kept = tuple(sorted({7, 50, 100, *range(20, 45)}))
    result = cut(Checkpoint.open(source), Keep({"vocab": kept}), tmp_path / "out")
    moved = {"pad_token_id": 0, "bos_token_id": 26, "eos_token_id": [27, 26]}
    assert {key: result.raw[key] for key in ids} == moved
    assert json.loads((result.path / "generation_config.json").read_text()) == moved


def test_a_tokenizer_that_cannot_be_cut_is_refused(models: Models, tmp_path: Path) -> None:
    source = Path(shutil.copytree(models("llama"), tmp_path / "source"))
    (source / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ShearlingError, match=r"\(tokenizer\.model\).* tokenizer\.json is needed"):
        cut(Checkpoint.open(source), Keep({"vocab": tuple(range(50))}), tmp_path / "out")
    cut(Checkpoint.open(source), Keep({"hidden": tuple(range(9))}), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"x"
