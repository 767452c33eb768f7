"""Quantised models load in stock transformers as what they were, and say what they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer import Typer
from typer.testing import CliRunner

from shearling.commands.quantize import quantize as command
from shearling.errors import ShearlingError
from shearling.files.writer import file_digest
from shearling.model import loading
from shearling.model.checkpoint import Checkpoint
from shearling.model.loading import load_model
from shearling.ship.quantize import check, open_source, plan, quantize
from tiny_tokenizer import write_llama

pytest.importorskip("torchao", reason="torchao is not installed")

app = Typer()
app.command("quantize")(command)
app.command("other")(lambda: None)  # so that commands keep their names


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)])


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = write_llama(tmp_path_factory.mktemp("models") / "wide", layers=2)
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


@pytest.fixture(scope="module")
def eight(source, tmp_path_factory) -> Path:
    """The same in int8."""
    output = tmp_path_factory.mktemp("models") / "eight"
    checkpoint = Checkpoint.open(source)
    quantize(checkpoint, output, plan(checkpoint, "int8"))
    return output


def stock(path: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def reference_int8(path: Path, quantised: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the source with what the file says in its matrices' places, checked on the way."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tensors = load_file(quantised / "model.safetensors")
    with torch.no_grad():
        for name, module in model.named_modules():
            if not isinstance(module, torch.nn.Linear) or name == "lm_head":
                continue
            values, scale = (tensors[f"{name}._weight_{part}"] for part in ("qdata", "scale"))
            assert (scale[:, 0] == module.weight.abs().amax(1) / 127.5).all()
            assert ((values * scale - module.weight).abs() <= 0.501 * scale).all()
            module.weight.copy_(values * scale)
        return model(ids, use_cache=False).logits


def test_every_family_in_int8_is_its_rows_rounded(models, variant, ids, tmp_path):
    checkpoint = Checkpoint.open(models(variant))
    wanted = plan(checkpoint, "int8")
    manifest = quantize(checkpoint, tmp_path / "out", wanted)
    assert manifest["proof"]["identical"]
    assert manifest["bytes"] == wanted.bytes < checkpoint.bytes
    expected = reference_int8(checkpoint.path, tmp_path / "out", ids)
    found = stock(tmp_path / "out", ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("variant", ["llama-tied", "qwen3", "gemma2", "phi3", "gpt_neox", "opt"])
def test_int4_keeps_what_its_group_does_not_divide(models, variant, tmp_path):
    checkpoint = Checkpoint.open(models(variant))
    wanted = plan(checkpoint, "int4", group=18, dtype="bfloat16")  # 18 divides 36 and 54, not 50
    manifest = quantize(checkpoint, tmp_path / "out", wanted)
    assert len(wanted.kept) == checkpoint.shape["layers"]
    assert set(wanted.kept.values()) == {50}
    assert wanted.remark is not None
    assert "(50 inputs) stays in bfloat16: its inputs are no multiple of the group" in wanted.remark
    assert manifest["bytes"] == wanted.bytes
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        rounded = [name for name in file.keys() if name.endswith("_weight_qdata")]  # noqa: SIM118
        values = torch.cat([file.get_tensor(name).flatten() for name in rounded])
        other = {file.get_slice(name).get_dtype() for name in set(file.keys()) - set(rounded)}
    assert len(rounded) == len(wanted.quantized)
    assert (values.min().item(), values.max().item()) == (-8, 7)
    assert other == {"BF16", "I8"}  # the second, zero points


def test_int4_unpacked_lies_within_half_a_step(source, tmp_path):
    checkpoint = Checkpoint.open(source)
    quantize(checkpoint, tmp_path / "out", plan(checkpoint, "int4", group=18))
    before = load_model(source).model.layers[1].self_attn.v_proj.weight
    weight: Any = load_model(tmp_path / "out").model.layers[1].self_attn.v_proj.weight
    groups = before.unflatten(1, (-1, 18))
    least, most = groups.amin(2, keepdim=True).clamp_max(0), groups.amax(2, keepdim=True)
    step = (most.clamp_min(0) - least) / 15
    error = (weight.dequantize().unflatten(1, (-1, 18)) - groups).abs()
    assert (error <= 0.51 * step).all()
    assert error.max() > 0.4 * step.min()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("to", "group", "stored"), [("int8", None, None), ("int4", 12, "bfloat16")]
)
def test_a_quantised_model_computes_in_any_type(source, tmp_path, to, group, stored, dtype):
    checkpoint = Checkpoint.open(source)
    quantize(checkpoint, tmp_path / "out", plan(checkpoint, to, group=group, dtype=stored))
    ids = torch.arange(3, 20)[None]
    same = stock(tmp_path / "out", ids).float()
    found = load_model(tmp_path / "out", dtype=dtype)(ids, use_cache=False).logits
    assert found.dtype == getattr(torch, dtype)
    assert (found.float() - same).abs().max() < 0.05 * same.abs().max()


def test_directory_and_manifest_say_everything(source, eight):
    manifest = json.loads((eight / "shearling.json").read_text())
    assert (manifest["kind"], manifest["stage"]) == ("manifest", "quantize")
    assert manifest["source"]["fingerprint"] == Checkpoint.open(source).fingerprint
    assert manifest["options"] == {
        "to": "int8", "bits": 8, "stored_bits": 8, "group": None, "dtype": "float32",
        "matrices": 14, "weights": 2 * (2 * 36 * 36 + 2 * 12 * 36 + 3 * 36 * 50), "kept": {},
    }  # fmt: skip
    assert manifest["files"] == {"model.safetensors": file_digest(eight / "model.safetensors")}
    assert manifest["parameters"] == manifest["source_parameters"]
    assert manifest["bytes"] < manifest["source_bytes"]
    assert manifest["proof"]["identical"]
    assert 0 < manifest["proof"]["divergence"] < 0.1
    assert "torchao" in manifest["versions"]
    names = {file.name for file in eight.iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "config.json"} <= names
    assert {file.suffix for file in eight.iterdir()} == {".json", ".jinja", ".safetensors"}
    config = json.loads((eight / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "torchao"
    raw = json.loads((source / "config.json").read_text())
    assert {key: config.get(key) for key in raw} == raw


def test_command_measures_before_and_after_alike(source, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The sheep on the hill. " * 20)
    done = run(
        source, "--to", "int8", "--output", tmp_path / "out", "--text", text, "--window", "16",
        "--max-windows", "4", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.exception
    found = json.loads(done.stdout)["evaluations"]
    alike = ("text", "window", "windows", "tokens", "bos")
    assert [found["before"][key] for key in alike] == [found["after"][key] for key in alike]
    assert found["before"]["perplexity"] != found["after"]["perplexity"]
    assert found["after"]["perplexity"] == pytest.approx(found["before"]["perplexity"], rel=0.05)


def test_dry_run_writes_nothing_and_foretells_the_size(source, eight, tmp_path):
    done = run(source, "--to", "int8", "--output", tmp_path / "out", "--dry-run", "--json")
    said = json.loads(done.stdout)
    assert list(tmp_path.iterdir()) == []
    assert said["bytes"] == json.loads((eight / "shearling.json").read_text())["bytes"]


def test_command_names_the_next_one(source, tmp_path):
    done = run(source, "--to", "int4", "--group", 36, "--output", tmp_path / "out")
    assert f"next: shearling eval {tmp_path / 'out'}" in done.stdout
    assert "down_proj (50 inputs) stays in float32" in done.stdout


def test_refuses_what_is_quantised_already(eight, tmp_path):
    with pytest.raises(ShearlingError, match=r"quantised already \(by torchao\); give the checkp"):
        open_source(eight)


def test_refuses_unknown_targets_types_and_groups(source):
    checkpoint = Checkpoint.open(source)
    with pytest.raises(ShearlingError, match="--to int3 is not known; give int8 or int4"):
        plan(checkpoint, "int3")
    with pytest.raises(ShearlingError, match="'int8' is not known here; give float32"):
        plan(checkpoint, "int8", dtype="int8")
    with pytest.raises(
        ShearlingError, match=r"multiple of the group of 32 \(they have 36, 50\); .*36"
    ):
        plan(checkpoint, "int4")
    with pytest.raises(ShearlingError, match="at least 2"):
        plan(checkpoint, "int8", group=1)


def test_default_group_is_the_one_that_divides_most(tmp_path):
    config = LlamaConfig(
        hidden_size=48, intermediate_size=112, num_hidden_layers=1, num_attention_heads=3,
        num_key_value_heads=3, vocab_size=20,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    wanted = plan(Checkpoint.open(tmp_path / "model"), "int4")  # 32 divides neither 48 nor 112
    assert (wanted.group, wanted.kept) == (16, {})


def test_refuses_an_output_that_is_taken_before_any_work(source, tmp_path):
    (tmp_path / "file").write_text("")
    checkpoint = Checkpoint.open(source)
    with pytest.raises(ShearlingError, match="exists and is not empty"):
        check(checkpoint, tmp_path, plan(checkpoint, "int8"))


def test_says_how_to_get_torchao(source, eight, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    checkpoint = Checkpoint.open(source)
    with pytest.raises(ShearlingError, match=r"pip install 'shearling\[quantize\]'"):
        check(checkpoint, tmp_path / "out", plan(checkpoint, "int8"))
    with pytest.raises(ShearlingError, match=r"by torchao, which is not installed.*\[quantize\]"):
        load_model(eight)


def test_a_model_that_does_not_load_as_it_was_is_not_written(source, tmp_path, monkeypatch):
    from shearling.ship import quantize as module

    saved = module._write

    def spoil(source, model, staging):
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.qdata[0] = 0
        return saved(source, model, staging)

    monkeypatch.setattr(module, "_write", spoil)
    checkpoint = Checkpoint.open(source)
    with pytest.raises(ShearlingError, match="does not load as what it was in memory"):
        quantize(checkpoint, tmp_path / "out", plan(checkpoint, "int8"))
    assert list(tmp_path.iterdir()) == []


def test_a_quantised_weight_that_is_missing_is_refused(eight, tmp_path):
    copy = shutil.copytree(eight, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    with safe_open(copy / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    for ending in ("qdata", "scale", "zero_point"):
        tensors.pop(f"model.layers.1.mlp.up_proj._weight_{ending}")
    save_file(tensors, copy / "model.safetensors", metadata=metadata)
    with pytest.raises(ShearlingError, match="up_proj"):
        load_model(copy)
