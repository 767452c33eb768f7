"""Whatever stock transformers runs can be opened to be measured."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.model.loading import load_model
from shearling.model.subject import Subject, open_subject


@pytest.fixture
def unknown(tmp_path, tokenizer):
    """A model of a family that shearling does not cut, embeddings tied."""
    path = tmp_path / "gpt2"
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=12, n_head=3, vocab_size=300, n_positions=32)
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path, sum(parameter.numel() for parameter in model.parameters())


def test_a_model_that_can_be_cut_is_a_checkpoint(model_directory):
    assert isinstance(open_subject(model_directory), Checkpoint)
    assert open_subject(model_directory).fingerprint == Checkpoint.open(model_directory).fingerprint


def test_an_architecture_without_a_table_has_no_layout(unknown):
    path, parameters = unknown
    subject = open_subject(path)
    assert isinstance(subject, Subject)
    assert (subject.name, subject.layout, subject.quantization) == ("gpt2", None, None)
    assert subject.parameters == parameters
    assert dict(subject.shape) == {"layers": 2, "hidden": 12, "heads": 3, "vocab": 300}
    assert subject.bytes == (path / "model.safetensors").stat().st_size
    assert subject.tokenizer().bos_token_id == 256
    assert load_model(subject.path)(torch.tensor([[1, 2]])).logits.shape == (1, 2, 300)


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.parametrize("to", ["int8", "int4"])
def test_a_quantised_model_counts_as_its_source_does(model_directory, tmp_path, to):
    from shearling.ship.quantize import plan, quantize

    source = Checkpoint.open(model_directory)
    made = quantize(
        source, tmp_path / "small", plan(source, to, group=12 if to == "int4" else None)
    )
    subject = open_subject(tmp_path / "small")
    assert isinstance(subject, Subject)
    assert subject.layout == source.layout
    assert dict(subject.shape) == dict(source.shape)
    assert subject.parameters == source.parameters
    assert subject.bytes < source.path.joinpath("model.safetensors").stat().st_size
    assert subject.fingerprint == made["model"]["fingerprint"] != source.fingerprint
    assert subject.quantization is not None
    assert subject.quantization["quant_method"] == "torchao"


def test_a_fingerprint_follows_weights_and_configuration(unknown, tmp_path):
    path, _ = unknown
    first = open_subject(path).fingerprint
    copy = shutil.copytree(path, tmp_path / "copy")
    assert open_subject(copy).fingerprint == first
    model: Any = load_model(copy)
    model.transformer.h[1].mlp.c_fc.weight[0, 0] += 1
    model.save_pretrained(copy)
    changed = open_subject(copy).fingerprint
    assert changed != first
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(raw | {"layer_norm_epsilon": 1e-3}))
    assert open_subject(copy).fingerprint not in (first, changed)


def test_refuses_a_directory_without_safetensors(unknown):
    path, _ = unknown
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ShearlingError, match="holds no safetensors"):
        open_subject(path)


def test_refuses_what_transformers_does_not_know(unknown):
    path, _ = unknown
    (path / "config.json").write_text(json.dumps({"model_type": "gpt-of-the-future"}))
    with pytest.raises(ShearlingError, match="refused by transformers"):
        open_subject(path)


def test_refuses_what_is_no_model(tmp_path):
    with pytest.raises(ShearlingError, match="neither a directory"):
        open_subject(str(tmp_path / "nothing"))
