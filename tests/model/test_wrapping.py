"""Language models inside larger ones: read, cut, healed and written back as what they lie in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.model.inspect import inspect, lines
from shearling.model.loading import load_model
from shearling.model.memory import loaded_bytes
from shearling.model.subject import open_subject
from shearling.pruning.cut import cut
from shearling.table.families.wrappers import WRAPPERS
from shearling.table.values import Keep
from shearling.train.build import loaded
from shearling.train.finish import save
from shearling.train.parallel import World
from tiny_cuts import relative
from tiny_wrappers import WRAPPED, inputs_first, tiny_wrapper

IDS = torch.randint(3, 80, (2, 17), generator=torch.Generator().manual_seed(1))
Wrapped = Callable[[str], Path]


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory: pytest.TempPathFactory) -> Wrapped:
    root = tmp_path_factory.mktemp("wrapped")

    @cache
    def directory(name: str) -> Path:
        tiny_wrapper(name).save_pretrained(root / name)
        (root / name / "preprocessor_config.json").write_text('{"size": 28}')
        return root / name

    return directory


@torch.no_grad()
def whole(path: Path) -> tuple[Tensor, Any]:
    """Logits of the whole model, which accounts for every tensor on disk, and its class."""
    loaded_with: Any = AutoModelForImageTextToText
    model, info = loaded_with.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()(input_ids=IDS, use_cache=False).logits, type(model)


def keep_of(checkpoint: Checkpoint) -> Keep:
    """Blocks 0, 2 and 3, 31 neurons of each or 3 experts of 8, and groups where the whole lets go.

    Of Gemma 4, whose last block stays, that and block 0 and 3.
    """
    blocks: dict[str, Any] = {}
    if "mlp" in checkpoint.shape and not checkpoint.layout.axis["mlp"].rigid:
        blocks["mlp"] = tuple(tuple(range(n, n + 31)) for n in (0, 5, 19))
    if "experts" in checkpoint.shape:
        blocks["experts"] = ((0, 2, 3), (1, 2, 4), (0, 1, 2))
        blocks["expert_mlp"] = tuple(
            tuple(16 * expert + at for expert in kept for at in range(expert, expert + 8))
            for kept in blocks["experts"]
        )
    if "heads" not in checkpoint.family.frozen:
        blocks["kv_heads"] = ((0, 2), (1, 2), (0, 1))
    last = checkpoint.family.model_type == "gemma4_text"
    return Keep({"layers": (0, 3, 4) if last else (0, 2, 3)}, blocks)


def others(path: Path) -> dict[str, Tensor]:
    """Tensors on disk that no language model holds, told by their names."""
    return {
        name: tensor
        for name, tensor in load_file(path / "model.safetensors").items()
        if any(part in name for part in ("vision", "visual", "projector", "connector"))
    }


def test_every_wrapper_is_tried_here() -> None:
    assert {name.partition("-")[0] for name in WRAPPED} == WRAPPERS.keys()


@pytest.mark.parametrize("name", WRAPPED)
def test_it_is_the_language_model(wrapped: Wrapped, name: str) -> None:
    checkpoint = Checkpoint.open(wrapped(name))
    assert checkpoint.family.model_type == WRAPPED[name][2]
    assert type(open_subject(wrapped(name))) is Checkpoint
    file = load_file(wrapped(name) / "model.safetensors")
    own = sum(t.numel() for t in file.values()) - sum(
        t.numel() for t in others(wrapped(name)).values()
    )
    assert checkpoint.parameters == own
    assert loaded_bytes(wrapped(name)) == 4 * own
    expected, _ = whole(wrapped(name))
    model = load_model(wrapped(name))
    factors = sum(b.numel() for n, b in model.named_buffers() if n.endswith("layer_scalar"))
    assert sum(p.numel() for p in model.parameters()) + factors == own
    assert relative(model(input_ids=IDS, use_cache=False).logits, expected) < 1e-6


@pytest.mark.parametrize("name", WRAPPED)
def test_a_cut_is_what_it_was_in(wrapped: Wrapped, name: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(wrapped(name))
    before, kind = whole(wrapped(name))
    result = cut(checkpoint, keep_of(checkpoint), tmp_path / "out", shard_bytes=10**9)
    proof = json.loads((tmp_path / "out" / "shearling.json").read_text())["proof"]
    assert proof["max_relative_difference"] < 1e-5
    assert proof["loaded_with"] == "AutoModelForImageTextToText"
    after, now = whole(result.path)
    assert now is kind
    assert relative(load_model(result.path)(input_ids=IDS, use_cache=False).logits, after) < 1e-6
    assert relative(after, before) > 1e-3
    assert result.shape["layers"] == 3
    expected = checkpoint.layout.cut(keep_of(checkpoint), checkpoint.shape).after
    assert result.shape == expected != checkpoint.shape
    left, kept = others(wrapped(name)), others(result.path)
    assert left.keys() == kept.keys()
    assert all(torch.equal(left[tensor], kept[tensor]) for tensor in left)
    assert (result.path / "preprocessor_config.json").read_text() == '{"size": 28}'
    raws = [json.loads((p / "config.json").read_text()) for p in (wrapped(name), result.path)]
    texts = [raw.pop("text_config") for raw in raws]
    assert raws[0] == raws[1]
    changed = {key for key in texts[1] if texts[1][key] != texts[0].get(key)}
    assert changed <= {
        "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads",
        "layer_types", "head_dim", "num_experts", "mtp_num_hidden_layers", "per_layer_config",
        "num_local_experts", "moe_intermediate_size", "mlp_only_layers",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
def test_what_is_trained_is_written_back(wrapped: Wrapped, name: str, tmp_path: Path) -> None:
    """One step of healing, by hand, and the writer that healing ends with."""
    checkpoint = Checkpoint.open(wrapped(name))
    model = loaded(checkpoint, World())
    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    save(checkpoint, model, tmp_path / "out", World())
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
    assert relative(whole(tmp_path / "out")[0], expected) < 1e-6
    assert relative(whole(wrapped(name))[0], expected) > 1e-4
    left, kept = others(wrapped(name)), others(tmp_path / "out")
    assert all(torch.equal(left[tensor], kept[tensor]) for tensor in left)


def test_fingerprints_know_every_byte(wrapped: Wrapped, tmp_path: Path) -> None:
    source = Path(shutil.copytree(wrapped("gemma3"), tmp_path / "source"))
    before = Checkpoint.open(source).fingerprint
    assert before == Checkpoint.open(wrapped("gemma3")).fingerprint
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if "vision" in name)
    tensors[name] = tensors[name] + 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert Checkpoint.open(source).fingerprint != before


OLD, NEW = "language_model.model.", "model.language_model."


def restyled(source: Path, target: Path, change: Callable[[str], str]) -> Path:
    """A copy whose tensors have other names."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    renamed = {change(name): tensor for name, tensor in tensors.items()}
    save_file(renamed, target / "model.safetensors", metadata={"format": "pt"})
    return target


def as_of_2025(name: str) -> str:
    if name.startswith(OLD):
        return NEW + name.removeprefix(OLD)
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    return f"model.{name}"


@pytest.mark.parametrize("name", ["gemma3", "mistral3"])
def test_names_of_both_years_are_read(wrapped: Wrapped, name: str, tmp_path: Path) -> None:
    other = restyled(wrapped(name), tmp_path / "other", as_of_2025)
    expected, _ = whole(wrapped(name))
    assert torch.equal(whole(other)[0], expected)
    checkpoint = Checkpoint.open(other)
    result = cut(checkpoint, keep_of(checkpoint), tmp_path / "out")
    whole(result.path)
    stored = load_file(result.path / "model.safetensors")
    assert any(tensor.startswith(NEW) for tensor in stored)
    assert not any(tensor.startswith(OLD) for tensor in stored)


def as_on_hubs(path: Path) -> Path:
    """Experts turned round in place, and their number spelled, as hubs hold Qwen3-VL's."""
    inputs_first(path)
    raw = json.loads((path / "config.json").read_text())
    raw["text_config"]["num_experts"] = raw["text_config"].pop("num_local_experts")
    (path / "config.json").write_text(json.dumps(raw))
    return path


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "qwen3_vl_moe-mixed"])
def test_experts_are_written_as_they_were_stored(
    wrapped: Wrapped, name: str, tmp_path: Path
) -> None:
    own = Checkpoint.open(wrapped(name))
    turned = as_on_hubs(Path(shutil.copytree(own.path, tmp_path / "turned")))
    expected, _ = whole(own.path)
    assert torch.equal(whole(turned)[0], expected)
    assert relative(load_model(turned)(input_ids=IDS, use_cache=False).logits, expected) < 1e-6
    source = Checkpoint.open(turned)
    assert source.sizes == own.sizes
    assert loaded_bytes(turned) == loaded_bytes(own.path)
    before = dict(own.read(own.dtypes))
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.read(source.dtypes))
    assert source.fingerprint != own.fingerprint
    cuts = [cut(one, keep_of(one), tmp_path / at).path for at, one in (("a", own), ("b", source))]
    assert torch.equal(whole(cuts[0])[0], whole(cuts[1])[0])
    raws = [json.loads((path / "config.json").read_text())["text_config"] for path in cuts]
    counts = [{key: raw[key] for key in raw if key.endswith("l_experts")} for raw in raws]
    counts += [{key: raw[key] for key in raw if key == "num_experts"} for raw in raws]
    assert counts == [{"num_local_experts": 3}, {}, {}, {"num_experts": 3}]
    stacks = [load_file(path / "model.safetensors") for path in cuts]
    at = "model.language_model.layers.0.mlp.experts"
    sizes = [[tuple(s[f"{at}.{of}"].shape) for of in ("gate_up_proj", "down_proj")] for s in stacks]
    assert sizes == [[(3, 16, 36), (3, 36, 8)], [(3, 36, 16), (3, 8, 36)]]
    save(source, loaded(source, World()), tmp_path / "saved", World())
    again, stored = (load_file(at / "model.safetensors") for at in (tmp_path / "saved", turned))
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], stored[name]) for name in stored)


def test_square_stacks_are_written_as_transformers_reads_them(tmp_path: Path) -> None:
    """Those with 32 inputs, of 16 neurons' gates and what they gate, were 48 by 32 before."""
    kind, arguments, _ = WRAPPED["qwen3_vl_moe"]
    text = arguments["text_config"] | {"hidden_size": 32, "moe_intermediate_size": 24}
    eye = arguments["vision_config"] | {"out_hidden_size": 32}
    config = getattr(transformers, kind)(**arguments | {"text_config": text, "vision_config": eye})
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "source")
    source = Checkpoint.open(as_on_hubs(tmp_path / "source"))
    kept = tuple(24 * expert + at for expert in range(5) for at in range(16))
    result = cut(source, Keep({}, {"expert_mlp": (kept,) * 5}), tmp_path / "out")
    at = "model.language_model.layers.0.mlp.experts"
    stored = load_file(result.path / "model.safetensors")
    assert stored[f"{at}.gate_up_proj"].shape == (5, 32, 32)
    assert stored[f"{at}.down_proj"].shape == (5, 16, 32)
    whole(result.path)


def test_flat_configurations_of_qwen_stay_flat(wrapped: Wrapped, tmp_path: Path) -> None:
    """As Qwen2.5-VL's were before transformers nested them."""
    source = Path(shutil.copytree(wrapped("qwen2_5_vl"), tmp_path / "source"))
    raw = json.loads((source / "config.json").read_text())
    text = raw.pop("text_config")
    rope = text.pop("rope_parameters")
    old = {"rope_theta": rope["rope_theta"], "torch_dtype": "float32"}
    old |= {"rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    for key in ("dtype", "layer_types"):
        text.pop(key)
        raw.pop(key, None)
    flat = {**text, **raw, **old}
    (source / "config.json").write_text(json.dumps(flat))
    checkpoint = Checkpoint.open(source)
    expected = whole(wrapped("qwen2_5_vl"))[0]
    assert torch.equal(whole(source)[0], expected)
    found = load_model(source)(input_ids=IDS, use_cache=False).logits
    assert relative(found, expected) < 1e-6
    result = cut(checkpoint, keep_of(checkpoint), tmp_path / "out")
    whole(result.path)
    after = json.loads((result.path / "config.json").read_text())
    assert "text_config" not in after
    assert {key: after[key] for key in old} == old
    assert (after["num_hidden_layers"], after["intermediate_size"]) == (3, 31)


def test_heads_that_predict_further_are_dropped(wrapped: Wrapped, tmp_path: Path) -> None:
    source = Path(shutil.copytree(wrapped("qwen3_5"), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    ahead = {"mtp.fc.weight": torch.ones(36, 72)}
    save_file(tensors | ahead, source / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(source)
    (note,) = checkpoint.notes(checkpoint.shape.with_(layers=3))
    assert "predict tokens further ahead are not copied" in note
    result = cut(checkpoint, keep_of(checkpoint), tmp_path / "out")
    whole(result.path)
    assert "mtp.fc.weight" not in load_file(result.path / "model.safetensors")
    raws = [json.loads((p / "config.json").read_text()) for p in (source, result.path)]
    assert [raw["text_config"]["mtp_num_hidden_layers"] for raw in raws] == [1, 0]


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "keep", "sentence"),
    [
        ("gemma3", {"hidden": range(30)}, "^hidden=30 cannot .* projector of gemma3, .*hidden=36"),
        ("llava", {"vocab": range(60)}, "^vocab=60 cannot .* images by their ids; .*vocab=101"),
        ("qwen2_5_vl", {"heads": range(6)}, "^heads=6 cannot .* width of a head as hidden / heads"),
    ],
)
def test_what_something_else_reads_stays(
    wrapped: Wrapped, name: str, keep: dict[str, range], sentence: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(wrapped(name))
    per_block = {axis: (tuple(kept),) * 5 for axis, kept in keep.items() if axis == "heads"}
    wanted = {axis: tuple(kept) for axis, kept in keep.items() if axis != "heads"}
    if per_block:
        per_block = {"heads": ((0, 1, 3, 4, 6, 7),) * 5}
    with pytest.raises(ShearlingError, match=sentence):
        cut(checkpoint, Keep(wanted, per_block), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_a_language_model(wrapped: Wrapped, tmp_path: Path) -> None:
    source = Path(shutil.copytree(wrapped("gemma3"), tmp_path / "source"))
    save_file(others(source), source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ShearlingError, match="gemma3, but holds no language model"):
        Checkpoint.open(source)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "kosmos-2.5"}, "inside 'kosmos-2.5', which shearling does not know"),
        ({"text_config": {"model_type": "bloom"}}, "language model inside .*, a llava, is of .*bl"),
        ({"quantization_config": {"quant_method": "fp8"}}, "is quantised .by fp8."),
    ],
)
def test_what_is_not_known(
    wrapped: Wrapped, change: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(wrapped("llava"), tmp_path / "source"))
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(ShearlingError, match=sentence):
        Checkpoint.open(source)


def test_a_language_model_alone_may_still_name_a_text_config(tmp_path: Path) -> None:
    from tiny_models import tiny_model

    tiny_model("gemma3").save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"text_config": {"hidden_size": 7}}))
    assert Checkpoint.open(tmp_path).wrapping is None


def test_inspect_says_what_stays(wrapped: Wrapped) -> None:
    told = inspect(Checkpoint.open(wrapped("qwen2_5_vl")))
    assert told["prunable_axes"] == ["layers", "mlp"]
    beside = others(wrapped("qwen2_5_vl"))
    assert told["wrapper"] == {
        "architecture": "qwen2_5_vl",
        "tensors": len(beside),
        "bytes": sum(tensor.nbytes for tensor in beside.values()),
    }
    text = "\n".join(lines(told))
    assert "can be cut   layers, mlp" in text
    assert f"inside       a qwen2_5_vl, whose other {len(beside)} tensors" in text
    assert "stays        heads, kv_heads: its code computes" in text
