"""A model with its adapter merged is what transformers loads with the adapter beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.model.lineage import blocks_in
from shearling.model.loading import load_model
from shearling.model.manifest import read_manifest
from shearling.model.subject import open_subject
from shearling.pruning.cut import cut
from shearling.table.values import Keep
from tiny_tokenizer import write_llama

peft = pytest.importorskip("peft", reason="peft is not installed")
IDS = torch.arange(40).reshape(2, 20) * 6 % 256
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHEARLING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_adapter(base: Path, target: Path, **options: Any) -> Path:
    """An adapter of random values for ``base``, in ``target``."""
    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(
        **{"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | options
    )
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(target)
    edit(target / CONFIG, base_model_name_or_path=str(base))
    return target


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def contents(directory: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in directory.rglob("*") if file.is_file()}


@torch.no_grad()
def logits(path: Path) -> torch.Tensor:
    """As transformers and peft compute them from a directory, in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval()(IDS).logits


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A model with an adapter beside its weights."""
    path = write_llama(tmp_path / "flock", layers=3)
    return write_adapter(path, path)


def test_merged_is_what_transformers_loads(beside: Path, own_cache: Path) -> None:
    before = contents(beside)
    merged = Checkpoint.open(beside, merge_adapter=True)
    assert merged.name == "flock-merged"
    assert merged.path.is_relative_to(own_cache)
    expected, found = logits(beside), logits(merged.path)
    assert (found - expected).abs().max() < 1e-4
    assert contents(beside) == before
    source, written = load_file(beside / "model.safetensors"), dict(merged.read(merged.files))
    changed = {name for name, tensor in written.items() if not torch.equal(tensor, source[name])}
    assert changed == {name for name in written if "q_proj" in name or "down_proj" in name}
    assert not list(merged.path.glob("adapter_*"))
    made = contents(merged.path)
    assert open_subject(beside, merge_adapter=True).path == merged.path
    assert contents(merged.path) == made


def test_what_was_merged_is_in_the_lineage(beside: Path, tmp_path: Path) -> None:
    merged = Checkpoint.open(beside, merge_adapter=True)
    shorter = cut(merged, Keep({"layers": (0, 2)}), tmp_path / "shorter")
    parent = (read_manifest(shorter.path) or {})["parent"]
    assert parent["stage"] == "merge"
    assert parent["adapter"]["name"] == "flock"
    assert set(parent["adapter"]["files"]) == {CONFIG, WEIGHTS}
    assert parent["proof"]["passed"]
    (beside / CONFIG).unlink()
    assert parent["source"]["fingerprint"] == Checkpoint.open(beside).fingerprint
    assert blocks_in(shorter, Checkpoint.open(beside)) == (0, 2)


def test_types_stay_as_they_are_stored(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "half", layers=2, dtype=torch.bfloat16)
    merged = Checkpoint.open(write_adapter(path, path), merge_adapter=True)
    assert set(merged.dtypes.values()) == {"BF16"}
    source = load_file(path / "model.safetensors")
    adapter = load_file(path / WEIGHTS)
    name = "model.layers.1.mlp.down_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"].float() for side in "AB")
    expected = (source[f"{name}.weight"].float() + 8 / 2 * b @ a).bfloat16()
    assert torch.equal(dict(merged.read([f"{name}.weight"]))[f"{name}.weight"], expected)


def test_an_adapter_alone_names_its_base_and_brings_its_tokenizer(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "flock", layers=2)
    alone = write_adapter(base, tmp_path / "alone")
    shutil.copy(base / "tokenizer.json", alone)
    edit(base / "tokenizer_config.json", model_max_length=7)
    shutil.copy(base / "tokenizer_config.json", alone)
    edit(alone / "tokenizer_config.json", model_max_length=9)
    with pytest.raises(ShearlingError, match=rf"belongs to {base}; give --merge-adapter"):
        Checkpoint.open(alone)
    merged = Checkpoint.open(alone, merge_adapter=True)
    assert (logits(merged.path) - logits(alone)).abs().max() < 1e-4
    assert merged.tokenizer().model_max_length == 9


def test_without_being_asked_it_is_refused(beside: Path) -> None:
    for opened in (Checkpoint.open, open_subject, load_model):
        with pytest.raises(ShearlingError, match=r"beside its weights.*give --merge-adapter"):
            opened(beside)


def pickled(path: Path) -> None:
    (path / WEIGHTS).rename(path / "adapter_model.bin")


def of_another_model(path: Path) -> None:
    tensors = load_file(path / WEIGHTS)
    more = {
        name.replace("layers.1", "layers.7"): tensor.clone() for name, tensor in tensors.items()
    }
    save_file(tensors | more, path / WEIGHTS)


def incomplete(path: Path) -> None:
    tensors = load_file(path / WEIGHTS)
    save_file({name: t for name, t in tensors.items() if "q_proj" not in name}, path / WEIGHTS)


def prompts(path: Path) -> None:
    edit(path / CONFIG, peft_type="PROMPT_TUNING")


def odd_type(path: Path) -> None:
    edit(path / CONFIG, peft_type=["LORA"])


def nothing(path: Path) -> None:
    tensors = load_file(path / WEIGHTS)
    save_file({name: t * torch.nan for name, t in tensors.items()}, path / WEIGHTS)


def megatron(path: Path) -> None:
    edit(path / CONFIG, megatron_config={"a": 1}, megatron_core="antigravity")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (pickled, r"is pickled \(adapter_model.bin\).*give a directory with adapter_model.saf"),
        (of_another_model, r"holds \d+ tensors that have no place in the model"),
        (incomplete, r"cannot be merged into flock by peft \(Found missing adapter keys"),
        (prompts, r"'PROMPT_TUNING', which cannot be merged"),
        (odd_type, r"\['LORA'\], which cannot be merged"),
        (nothing, r"has other logits than with the adapter"),
        (megatron, r"names Megatron's modules, which are never imported"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    harm: Callable[[Path], None], message: str, beside: Path, own_cache: Path
) -> None:
    harm(beside)
    with pytest.raises(ShearlingError, match=message):
        Checkpoint.open(beside, merge_adapter=True)
    assert not list(own_cache.rglob("config.json"))


def test_a_base_that_is_not_there_is_said(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "flock", layers=1)
    alone = write_adapter(base, tmp_path / "alone")
    edit(alone / CONFIG, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(ShearlingError, match=r"the adapter in .*alone is merged into .*gone: "):
        Checkpoint.open(alone, merge_adapter=True)
    edit(alone / CONFIG, base_model_name_or_path=None)
    with pytest.raises(ShearlingError, match="does not name the model that it belongs to"):
        Checkpoint.open(alone)
