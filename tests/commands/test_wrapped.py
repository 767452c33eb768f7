"""A language model inside a larger one, all the way through the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Qwen3VLMoeConfig,
)
from typer.testing import CliRunner

from shearling.cli import app
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.ship.converter import linked
from shearling.train.heal import heal
from shearling.train.options import Options
from tiny_store import write_store
from tiny_tokenizer import VOCAB, byte_tokenizer
from tiny_wrappers import _QWEN_IDS, WRAPPED, inputs_first

IDS = torch.randint(3, 250, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wrapped") / "seer"
    arguments = WRAPPED["gemma3"][1]
    text = arguments["text_config"] | {"vocab_size": VOCAB}
    torch.manual_seed(0)
    config = Gemma3Config(**(arguments | {"text_config": text, "image_token_index": 259}))
    AutoModelForImageTextToText.from_config(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    (path / "processor_config.json").write_text('{"image_seq_length": 4}')
    return path


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


@torch.no_grad()
def logits(path: Path) -> torch.Tensor:
    loaded_with: Any = AutoModelForImageTextToText
    model, info = loaded_with.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()(input_ids=IDS, use_cache=False).logits


def test_from_a_wrapper_to_a_smaller_healed_one(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the sheep went through the gate of the meadow " * 60)
    assert "inside       a gemma3" in run("inspect", source)
    run(
        "prune", source, "--output", tmp_path / "pruned", "--shape", "layers=3,mlp=31",
        "--calibration", text, "--samples", 8, "--length", 24,
    )  # fmt: skip
    manifest = json.loads((tmp_path / "pruned" / "shearling.json").read_text())
    assert manifest["repaired"]
    assert manifest["proof"]["loaded_with"] == "AutoModelForImageTextToText"
    pruned = Checkpoint.open(tmp_path / "pruned")
    assert (pruned.shape["layers"], pruned.shape["mlp"]) == (3, 31)
    options = Options.model_validate({"tokens": 2 * 4 * 24, "batch": 4, "lr": 1e-2})
    healed = heal(pruned, write_store(tmp_path), options, tmp_path / "healed")
    assert healed.model is not None
    assert not torch.equal(logits(tmp_path / "healed"), logits(tmp_path / "pruned"))
    kept = (tmp_path / "healed" / "processor_config.json").read_text()
    assert kept == '{"image_seq_length": 4}'
    with linked(healed.model) as folder:  # what a converter to GGUF is given
        alone = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(alone).__name__ == "Gemma3ForCausalLM"
    with torch.no_grad():
        found = alone(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(found, logits(tmp_path / "healed"))


def test_experts_of_a_wrapped_mixture_are_repaired(tmp_path: Path) -> None:
    arguments = WRAPPED["qwen3_vl_moe-mixed"][1]
    text = arguments["text_config"] | {"vocab_size": VOCAB + 4}
    torch.manual_seed(0)
    config = Qwen3VLMoeConfig(
        **arguments | {key: VOCAB + at for at, key in enumerate(_QWEN_IDS)} | {"text_config": text}
    )
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "seer")
    inputs_first(tmp_path / "seer")
    byte_tokenizer().save_pretrained(tmp_path / "seer")
    text_file = tmp_path / "text.txt"
    text_file.write_text("the sheep went through the gate of the meadow " * 60)
    assert "; 2 blocks dense" in run("inspect", tmp_path / "seer")
    run(
        "prune", tmp_path / "seer", "--output", tmp_path / "pruned", "--shape",
        "layers=4,experts=4,expert_mlp=8,heads=6,kv_heads=2", "--calibration", text_file,
        "--samples", 8, "--length", 24,
    )  # fmt: skip
    pruned = Checkpoint.open(tmp_path / "pruned")
    manifest = json.loads((tmp_path / "pruned" / "shearling.json").read_text())
    assert any(".mlp.experts.3.down_proj" in name for name in manifest["repaired"])
    assert manifest["proof"]["max_relative_difference"] < 1e-5
    loaded_with: Any = AutoModelForImageTextToText
    whole = loaded_with.from_pretrained(pruned.path).eval()
    greedy = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached, uncached = (
        whole.generate(input_ids=IDS, use_cache=use, **greedy) for use in (True, False)
    )
    assert torch.equal(cached, uncached)
    with linked(pruned) as folder, torch.no_grad():
        alone = AutoModelForCausalLM.from_pretrained(folder).eval()
        found = alone(input_ids=IDS, use_cache=False).logits
    assert type(alone).__name__ == "Qwen3MoeForCausalLM"
    torch.testing.assert_close(found, logits(pruned.path))


def test_a_wrapper_is_not_quantised(source: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["quantize", str(source), "--output", str(tmp_path / "q"), "--to", "int8"]
    )
    assert isinstance(done.exception, ShearlingError)
    assert "inside a gemma3, which is not quantised yet" in str(done.exception)
