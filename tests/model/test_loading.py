from __future__ import annotations

import json
import shutil

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from shearling.errors import ShearlingError
from shearling.model import memory
from shearling.model.loading import (
    load_config,
    load_model,
    load_tokenizer,
    longest_input,
)
from shearling.model.memory import check_fits, loaded_bytes


@pytest.fixture
def copy(model_directory, tmp_path):
    return shutil.copytree(model_directory, tmp_path / "copy")


def test_loads_in_the_dtype_asked_for(model_directory, model):
    loaded = load_model(model_directory)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert load_model(model_directory, dtype="bfloat16").dtype == torch.bfloat16
    assert longest_input(load_config(model_directory)) == 64
    assert load_tokenizer(model_directory).bos_token_id == 256


@pytest.mark.parametrize("load", [load_config, load_model])
def test_refuses_what_is_no_model_directory(load, tmp_path):
    with pytest.raises(ShearlingError, match=r"is not a model directory.*config\.json"):
        load(tmp_path)


@pytest.mark.parametrize("name", [".", "absent"])
def test_refuses_a_directory_without_a_tokenizer(name, tmp_path):
    with pytest.raises(ShearlingError, match=r"no tokenizer that.*give a directory with tokenizer"):
        load_tokenizer(tmp_path / name)


def test_refuses_an_unknown_dtype_and_device(model_directory):
    with pytest.raises(ShearlingError, match=r"'float8' is not known here; give float32"):
        load_model(model_directory, dtype="float8")
    with pytest.raises(ShearlingError, match="'toaster' cannot be used"):
        load_model(model_directory, device="toaster")


def test_refuses_a_configuration_that_is_not_json(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(ShearlingError, match=r"config\.json is not valid JSON .* write it again"):
        load_config(copy)


def test_refuses_truncated_weights(copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ShearlingError, match="cannot be loaded"):
        load_model(copy)


def test_refuses_pickled_weights(copy):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ShearlingError, match=r"cannot be loaded.*safetensors"):
        load_model(copy)


@pytest.mark.parametrize("change", ["missing", "misshapen"])
def test_refuses_weights_it_would_have_to_invent(copy, change):
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = tensors.pop(name)
    if change == "misshapen":
        tensors[name] = tensor[:-1].contiguous()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ShearlingError, match=rf"lacks 1 weights .* {name}"):
        load_model(copy)


def test_refuses_a_directory_without_tokenizer(smaller_directory):
    with pytest.raises(ShearlingError, match="tokenizer"):
        load_tokenizer(smaller_directory)


def test_refuses_a_model_that_does_not_fit(model_directory, monkeypatch):
    parameters = sum(t.numel() for t in load_file(model_directory / "model.safetensors").values())
    assert loaded_bytes(model_directory, torch.float32) == 4 * parameters
    assert loaded_bytes(model_directory) == 4 * parameters
    free = 3 * parameters
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    with pytest.raises(
        ShearlingError,
        match=r"about [1-9]\S* kB in float32, .* use bfloat16 \([1-9]\S* kB\)",
    ):
        load_model(model_directory)
    check_fits(model_directory, "bfloat16", extra_bytes=parameters)
    with pytest.raises(ShearlingError, match="in bfloat16, but") as error:
        check_fits(model_directory, torch.bfloat16, extra_bytes=parameters + 1)
    assert "use bfloat16" not in str(error.value)


def test_memory_is_that_of_the_device(model_directory):
    available = psutil.virtual_memory().available
    check_fits(model_directory, "float32", extra_bytes=available // 10)
    with pytest.raises(ShearlingError, match="memory on cpu"):
        check_fits(model_directory, "float32", extra_bytes=10 * available)
    check_fits(model_directory, "float32", extra_bytes=10 * available, device="meta")


def test_memory_counts_what_is_loaded_and_that_once(model_directory, tmp_path):
    tied = shutil.copytree(model_directory, tmp_path / "tied")
    tensors = load_file(tied / "model.safetensors")
    (tied / "model.safetensors").unlink()
    raw = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    first = {name: tensor for name, tensor in tensors.items() if "layers.0" in name}
    rest = {name: tensor for name, tensor in tensors.items() if name not in first}
    for file, held in {"a": first, "b": rest, "consolidated": tensors, "old": tensors}.items():
        save_file(held, tied / f"{file}.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(rest, "b.safetensors")
    (tied / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    model = load_model(tied)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert loaded_bytes(tied) == 4 * parameters
    assert loaded_bytes(tied, torch.bfloat16) == 2 * parameters
