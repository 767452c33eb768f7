"""Opening models: what is read is what is stored, and whatever is wrong is named."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.model.dtypes import torch_dtype
from shearling.model.subject import open_subject

Models = Callable[[str], Path]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def llama(models: Models, tmp_path: Path) -> Path:
    """A copy of a model, to be damaged."""
    return Path(shutil.copytree(models("llama"), tmp_path / "llama"))


def stored(directory: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def shard(directory: Path, tensors: Mapping[str, Tensor], count: int) -> None:
    """Replace the weights of a directory by ``count`` shards, names dealt out in turns."""
    (directory / WEIGHTS).unlink(missing_ok=True)
    files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    where = {name: files[i % count] for i, name in enumerate(tensors)}
    for file in files:
        part = {name: tensor for name, tensor in tensors.items() if where[name] == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a directory with a single file of weights."""
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def reconfigure(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(model: Path | str) -> str:
    """The sentence with which ``model`` is refused: one line, a full stop at its end."""
    with pytest.raises(ShearlingError) as error:
        Checkpoint.open(model)
    sentence = str(error.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert not sentence.endswith("..")
    return sentence


# --- what is read --------------------------------------------------------------------------------


def assert_reads_what_is_stored(checkpoint: Checkpoint, expected: Mapping[str, Tensor]) -> None:
    found = dict(checkpoint.read(checkpoint.files))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert checkpoint.bytes == sum(tensor.nbytes for tensor in expected.values())
    assert dict(checkpoint.sizes) == {name: tensor.nbytes for name, tensor in expected.items()}


def test_a_single_file(models: Models, variant: str) -> None:
    checkpoint = Checkpoint.open(models(variant))
    assert_reads_what_is_stored(checkpoint, stored(models(variant)))
    assert checkpoint.raw == json.loads((models(variant) / "config.json").read_text())


@pytest.mark.parametrize("variant", ["llama-tied", "gpt_neox", "opt"])
def test_shards_and_halves_as_transformers_writes_them(
    models: Models, variant: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(models(variant), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    checkpoint = Checkpoint.open(tmp_path)
    assert_reads_what_is_stored(checkpoint, stored(tmp_path))
    assert set(checkpoint.dtypes.values()) == {"BF16"}
    assert checkpoint.parameters == sum(p.numel() for p in model.parameters())


def test_reading_opens_each_shard_once_and_gives_what_was_asked_for(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shearling.model import checkpoint as module

    tensors = stored(llama)
    shard(llama, tensors, 3)
    checkpoint = Checkpoint.open(llama)
    opened = []
    original = module.safe_open

    def counting(file: Path, framework: str) -> Any:
        opened.append(file)
        return original(file, framework)

    monkeypatch.setattr(module, "safe_open", counting)
    names = [name for name in tensors if "layers.1." in name]
    found = dict(checkpoint.read(names))
    assert set(found) == set(names)
    assert len(opened) == len(set(opened)) <= 3


def test_names_inside_and_outside_the_blocks(models: Models, variant: str) -> None:
    checkpoint = Checkpoint.open(models(variant))
    inside = [name for i in range(5) for name in checkpoint.block_homes(i)]
    outside = checkpoint.outer_names()
    assert sorted(inside + outside) == sorted(stored(models(variant)))


def test_where_there_are_both_the_single_file_counts_as_in_transformers(llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    tensors = stored(llama)
    shard(llama, {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, 2)
    save_file(tensors, llama / WEIGHTS, metadata={"format": "pt"})
    checkpoint = Checkpoint.open(llama)
    stock = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    found = dict(checkpoint.read(tensors))
    assert all(torch.equal(found[name], stock[name]) for name in tensors)
    assert torch.equal(found["model.norm.weight"], tensors["model.norm.weight"])


def test_the_name_is_the_directory_s_or_the_hub_s(llama: Path, tmp_path: Path) -> None:
    assert Checkpoint.open(llama).name == "llama"
    snapshot = tmp_path / "models--a-lab--Tiny-1.5B" / "snapshots" / "0123abc"
    shutil.copytree(llama, snapshot)
    assert Checkpoint.open(snapshot).name == "Tiny-1.5B"


def test_the_name_of_a_directory_given_as_a_dot(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(llama)
    assert Checkpoint.open(".").name == "llama"


# --- the fingerprint -----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["llama-tied", "gpt_neox"])
def test_the_fingerprint_does_not_depend_on_shards(
    models: Models, variant: str, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(models(variant), tmp_path / "other-name"))
    shard(copy, stored(copy), 4)
    assert Checkpoint.open(copy).fingerprint == Checkpoint.open(models(variant)).fingerprint


def test_the_fingerprint_tells_every_tensor_s_head_apart(models: Models, tmp_path: Path) -> None:
    """A copy for each tensor, with a single value changed within its first 4 KiB."""
    source = Checkpoint.open(models("llama-tied"))
    tensors = stored(models("llama-tied"))
    copy = Path(shutil.copytree(models("llama-tied"), tmp_path / "copy"))
    seen = {source.fingerprint}
    for name, tensor in tensors.items():
        changed = tensor.clone()
        changed.view(-1)[min(1023, changed.numel() - 1)] += 1
        save_file({**tensors, name: changed}, copy / WEIGHTS, metadata={"format": "pt"})
        seen.add(Checkpoint.open(copy).fingerprint)
    assert len(seen) == 1 + len(tensors)


def test_the_fingerprint_speaks_of_configuration_and_type(llama: Path) -> None:
    first = Checkpoint.open(llama).fingerprint
    assert len(first) == 64
    reconfigure(llama, rms_norm_eps=1e-3)
    second = Checkpoint.open(llama).fingerprint
    rewrite(llama, lambda t: t.update({n: v.to(torch.bfloat16) for n, v in t.items()}))
    third = Checkpoint.open(llama).fingerprint
    assert len({first, second, third}) == 3


def test_the_order_of_keys_does_not_change_the_fingerprint(llama: Path) -> None:
    first = Checkpoint.open(llama).fingerprint
    file = llama / "config.json"
    items = list(json.loads(file.read_text()).items())
    file.write_text(json.dumps(dict(reversed(items))))
    assert Checkpoint.open(llama).fingerprint == first


# --- configurations that are refused -------------------------------------------------------------


def test_an_unknown_architecture(llama: Path) -> None:
    reconfigure(llama, model_type="mamba")
    sentence = refusal(llama)
    assert "'mamba'" in sentence
    assert str(llama) in sentence
    assert "gpt_neox" in sentence


def test_a_configuration_without_an_architecture(llama: Path) -> None:
    (llama / "config.json").write_text("{}")
    assert "None" in refusal(llama)


def test_no_configuration(llama: Path) -> None:
    (llama / "config.json").unlink()
    sentence = refusal(llama)
    assert str(llama / "config.json") in sentence
    assert "No such file" in sentence


def test_an_empty_directory(tmp_path: Path) -> None:
    assert "config.json" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{", "", '{"model_type": "llama",}', "\udcff"])
def test_a_configuration_that_is_not_json(llama: Path, text: str) -> None:
    (llama / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    sentence = refusal(llama)
    assert str(llama / "config.json") in sentence
    assert "not valid JSON" in sentence


def test_a_configuration_that_is_a_list(llama: Path) -> None:
    (llama / "config.json").write_text("[1]")
    assert "holds a list, but an object was expected" in refusal(llama)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", 7),  # 36 is no multiple
        ("num_hidden_layers", "five"),
        ("hidden_size", None),
    ],
)
def test_a_configuration_that_transformers_refuses(llama: Path, key: str, value: object) -> None:
    reconfigure(llama, **{key: value})
    assert str(llama) in refusal(llama)


def test_heads_that_groups_do_not_divide(llama: Path) -> None:
    reconfigure(llama, num_key_value_heads=2)
    sentence = refusal(llama)
    assert "heads=9" in sentence
    assert "kv_heads=2" in sentence


# --- weights that are refused --------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.999])
def test_a_truncated_file(llama: Path, share: float) -> None:
    file = llama / WEIGHTS
    data = file.read_bytes()[: int(share * file.stat().st_size)]
    file.write_bytes(data)
    sentence = refusal(llama)
    assert str(file) in sentence
    assert "truncated or corrupt" in sentence
    assert f"{len(data)} bytes" in sentence


@pytest.mark.parametrize("kept", ["header", "part of the header", "its length", "nothing"])
def test_a_file_of_which_only_the_header_came(llama: Path, kept: str) -> None:
    file = llama / WEIGHTS
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    size = {"header": 8 + length, "part of the header": 8 + length // 2, "its length": 8}
    file.write_bytes(data[: size.get(kept, 0)])
    sentence = refusal(llama)
    assert str(file) in sentence
    assert "truncated or corrupt" in sentence


@pytest.mark.parametrize("where", [0, 7, 8, 9, 60])
def test_a_corrupt_header(llama: Path, where: int) -> None:
    file = llama / WEIGHTS
    data = bytearray(file.read_bytes())
    data[where] = 0xFF
    file.write_bytes(data)
    sentence = refusal(llama)
    assert str(file) in sentence
    assert "truncated or corrupt" in sentence


def test_a_pointer_left_by_git_lfs(llama: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n"
    (llama / WEIGHTS).write_text(text)
    assert str(llama / WEIGHTS) in refusal(llama)


def test_a_truncated_shard_is_named(llama: Path) -> None:
    shard(llama, stored(llama), 3)
    culprit = llama / "model-00002-of-00003.safetensors"
    culprit.write_bytes(culprit.read_bytes()[:-1])
    sentence = refusal(llama)
    assert str(culprit) in sentence
    assert "truncated" in sentence


def test_a_missing_tensor(llama: Path) -> None:
    rewrite(llama, lambda t: t.pop("model.layers.3.mlp.up_proj.weight"))
    assert "lacks the tensor model.layers.3.mlp.up_proj.weight" in refusal(llama)


def test_fewer_blocks_than_the_configuration_says(llama: Path) -> None:
    reconfigure(llama, num_hidden_layers=6)
    assert "lacks the tensor model.layers.5." in refusal(llama)


def test_more_blocks_than_the_configuration_says(llama: Path) -> None:
    reconfigure(llama, num_hidden_layers=4)
    sentence = refusal(llama)
    assert "holds 9 tensors" in sentence
    assert "model.layers.4." in sentence


def test_a_tensor_of_another_shape(llama: Path) -> None:
    rewrite(llama, lambda t: t.update({"model.norm.weight": torch.zeros(37)}))
    sentence = refusal(llama)
    assert "model.norm.weight as [37]" in sentence
    assert "calls for [36]" in sentence


def test_a_transposed_tensor_has_the_same_count_and_another_shape(llama: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(llama, lambda t: t.update({name: t[name].T.contiguous()}))
    assert f"{name} as [36, 50]" in refusal(llama)


def test_a_tensor_too_many(llama: Path) -> None:
    rewrite(llama, lambda t: t.update({"model.layers.0.lora_A.weight": torch.zeros(2)}))
    sentence = refusal(llama)
    assert "model.layers.0.lora_A.weight" in sentence
    assert "llama" in sentence


def test_integers_are_refused(llama: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    rewrite(llama, lambda t: t.update({name: t[name].to(torch.int8)}))
    sentence = refusal(llama)
    assert "I8" in sentence
    assert "BF16" in sentence


def test_an_index_that_names_an_absent_shard(llama: Path) -> None:
    shard(llama, stored(llama), 3)
    (llama / "model-00003-of-00003.safetensors").unlink()
    sentence = refusal(llama)
    assert str(llama / INDEX) in sentence
    assert "model-00003-of-00003.safetensors" in sentence


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": "x"}'])
def test_an_index_without_a_map(llama: Path, index: str) -> None:
    (llama / WEIGHTS).unlink()
    (llama / INDEX).write_text(index)
    assert f"{llama / INDEX} has no weight_map" in refusal(llama)


def test_an_index_that_is_not_json(llama: Path) -> None:
    (llama / WEIGHTS).unlink()
    (llama / INDEX).write_text("{")
    assert f"{llama / INDEX} is not valid JSON" in refusal(llama)


@pytest.mark.parametrize("value", [["a"], 3, None, ""])
def test_an_index_of_something_else_than_files(llama: Path, value: object) -> None:
    (llama / WEIGHTS).unlink()
    (llama / INDEX).write_text(json.dumps({"weight_map": {"a": value, "b": "c"}}))
    assert str(llama / INDEX) in refusal(llama)


@pytest.mark.parametrize("outside", ["../x.safetensors", "sub/x.safetensors", "{}/x.safetensors"])
def test_an_index_that_names_a_file_elsewhere(llama: Path, outside: str) -> None:
    """Even where the file exists and holds the very tensors."""
    name = outside.format(llama.parent)
    tensors = stored(llama)
    (llama / WEIGHTS).unlink()
    (llama / "sub").mkdir()
    save_file(tensors, llama / name, metadata={"format": "pt"})
    (llama / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
    assert f"names {name}, which is not a file beside it" in refusal(llama)


def test_a_snapshot_of_pickles_alone_says_so(llama: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--somebody--flock" / "snapshots" / "0123"
    shutil.copytree(llama, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    for opened in (Checkpoint.open, open_subject):
        with pytest.raises(ShearlingError, match=r"pickled weights .* not even fetched: give"):
            opened(snapshot)


def test_weights_that_nothing_loads_are_named(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "consolidated.safetensors")
    with pytest.raises(ShearlingError, match=r"consolidated.safetensors is not one of these"):
        Checkpoint.open(llama)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_unopened(llama: Path, name: str) -> None:
    (llama / WEIGHTS).unlink()
    (llama / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    sentence = refusal(llama)
    assert name in sentence
    assert "pickled" in sentence


def test_no_weights(llama: Path) -> None:
    (llama / WEIGHTS).unlink()
    sentence = refusal(llama)
    assert f"{llama} holds no weights" in sentence
    assert WEIGHTS in sentence


# --- what old checkpoints carry ------------------------------------------------------------------


def test_old_rotary_tables_are_left_out(llama: Path) -> None:
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(5)]
    expected = stored(llama)
    rewrite(llama, lambda t: t.update({name: torch.zeros(3) for name in names}))
    assert_reads_what_is_stored(Checkpoint.open(llama), expected)


@pytest.fixture
def pythia(models: Models, tmp_path: Path) -> Path:
    """A GPT-NeoX checkpoint with the buffers that the first Pythia releases carry."""
    path = Path(shutil.copytree(models("gpt_neox"), tmp_path / "pythia"))
    old = {}
    for i in range(5):
        block = f"gpt_neox.layers.{i}.attention"
        old[f"{block}.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
        old[f"{block}.masked_bias"] = torch.tensor(-1e9)
        old[f"{block}.rotary_emb.inv_freq"] = torch.zeros(1)
    rewrite(path, lambda t: t.update(old))
    return path


def test_old_masks_are_left_out_and_real_biases_are_not(models: Models, pythia: Path) -> None:
    expected = stored(models("gpt_neox"))
    assert "gpt_neox.layers.0.attention.dense.bias" in expected
    assert_reads_what_is_stored(Checkpoint.open(pythia), expected)


@pytest.mark.parametrize("name", ["dense.bias", "query_key_value.bias"])
def test_real_biases_are_missed(pythia: Path, name: str) -> None:
    name = f"gpt_neox.layers.2.attention.{name}"
    rewrite(pythia, lambda t: t.pop(name))
    assert f"lacks the tensor {name}" in refusal(pythia)


@pytest.mark.parametrize(
    "name",
    [
        "gpt_neox.layers.0.cross_attention.bias",
        "gpt_neox.layers.0.attention.bias.scale",
        "gpt_neox.layers.0.attention.gate.bias",
        "gpt_neox.layers.0.my_rotary_emb.inv_freq",
    ],
)
def test_names_that_resemble_old_buffers_are_not_swallowed(pythia: Path, name: str) -> None:
    rewrite(pythia, lambda t: t.update({name: torch.zeros(3)}))
    assert name in refusal(pythia)


def test_a_tied_head_that_is_stored_as_well(models: Models, tmp_path: Path) -> None:
    path = Path(shutil.copytree(models("llama-tied"), tmp_path / "twice"))
    expected = stored(path)
    embedding = expected["model.embed_tokens.weight"]
    rewrite(path, lambda t: t.update({"lm_head.weight": embedding.clone()}))
    checkpoint = Checkpoint.open(path)
    assert "lm_head.weight" not in checkpoint.files
    assert_reads_what_is_stored(checkpoint, expected)
    assert checkpoint.parameters == sum(tensor.numel() for tensor in expected.values())


@pytest.mark.parametrize("damage", ["a value", "the shape", "the type"])
def test_a_tied_head_that_is_stored_with_other_values(
    models: Models, tmp_path: Path, damage: str
) -> None:
    """transformers would not tie the two; a cut that did would be another model."""
    path = Path(shutil.copytree(models("llama-tied"), tmp_path / "twice"))
    head = stored(path)["model.embed_tokens.weight"].clone()
    if damage == "a value":
        head[-1, -1] += 1
    head = {"the shape": head[:-1].clone(), "the type": head.half()}.get(damage, head)
    rewrite(path, lambda t: t.update({"lm_head.weight": head}))
    sentence = refusal(path)
    assert "lm_head.weight" in sentence
    assert "model.embed_tokens.weight" in sentence
    assert "tie_word_embeddings" in sentence


# --- what is not a model -------------------------------------------------------------------------


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    sentence = refusal(tmp_path / "nothing")
    assert f"{tmp_path / 'nothing'} is neither a directory" in sentence
    assert "hub id" in sentence


@pytest.mark.parametrize("name", ["nothing-here", "a/b/c", "a lab/a model"])
def test_a_name_that_is_no_hub_id_either(name: str) -> None:
    assert f"{name} is neither a directory" in refusal(name)


@pytest.mark.parametrize("name", ["no-such-lab/no-such-model", "../nowhere", "./nowhere"])
def test_a_hub_id_offline(name: str) -> None:
    sentence = refusal(name)
    assert f"{name} is no local directory and could not be fetched" in sentence


def test_a_plain_file(llama: Path) -> None:
    sentence = refusal(llama / WEIGHTS)
    assert f"{llama / WEIGHTS} is a file; give the directory it lies in" in sentence
    assert ".gguf" in sentence


def test_a_file_that_is_no_model_and_an_empty_name(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    expected = "a model directory, a .gguf file or a hub id was expected"
    sentence = refusal(tmp_path / "empty.txt")
    assert f"{tmp_path / 'empty.txt'} is a file that is no model; {expected}" in sentence
    assert f"An empty name was given for a model, but {expected}" in refusal("")


@pytest.mark.parametrize("data", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + bytes(40), b"x" * 4096])
def test_a_gguf_file_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    monkeypatch.setenv("SHEARLING_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(data)
    assert str(tmp_path / "model.gguf") in refusal(tmp_path / "model.gguf")
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_no_tokenizer(llama: Path) -> None:
    with pytest.raises(ShearlingError, match="has no tokenizer") as error:
        Checkpoint.open(llama).tokenizer()
    assert str(llama) in str(error.value)


def test_types_that_are_cut() -> None:
    assert torch_dtype("BF16") is torch.bfloat16
    assert torch_dtype("F64") is torch.float64
    with pytest.raises(ShearlingError, match="F8_E4M3"):
        torch_dtype("F8_E4M3")
