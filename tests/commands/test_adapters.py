"""An adapter beside a model's weights: every command gives the same answer."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer.main
from safetensors.torch import load_file

from every_command import COMMANDS, Inputs, run
from shearling import cli
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint

MARK = "adapter_config.json"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("adapters"), layers=3)


@pytest.fixture(scope="module")
def adapted(inputs: Inputs) -> Path:
    """Only the configuration: nobody has to read the rest to refuse it."""
    path = Path(shutil.copytree(inputs.plain, inputs.root / "adapted"))
    (path / MARK).write_text(json.dumps({"base_model_name_or_path": "a/b", "peft_type": "LORA"}))
    return path


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_it(name: str, inputs: Inputs, adapted: Path, tmp_path: Path) -> None:
    needed = {"export": "gguf", "quantize": "torchao", "studio": "fastapi", "judge": "openai"}
    if name in needed and find_spec(needed[name]) is None:
        pytest.skip(f"{needed[name]} is not installed")
    with pytest.raises(ShearlingError, match=r"adapted holds an adapter .*give --merge-adapter"):
        run(*inputs.arguments(name, adapted, tmp_path))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_merges_it(name: str) -> None:
    group: Any = typer.main.get_command(cli.app)
    command = group.commands[name]
    assert "--merge-adapter" in {flag for option in command.params for flag in option.opts}


def test_a_cut_is_one_of_the_merged_model(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    monkeypatch.setenv("SHEARLING_CACHE", str(tmp_path / "cache"))
    path = Path(shutil.copytree(inputs.plain, tmp_path / "adapted"))
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(r=1, target_modules=["up_proj"], init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(path), config).save_pretrained(path)
    run("prune", path, "--merge-adapter", "--remove", "1", "--output", tmp_path / "cut")
    assert "adapted is taken with its adapter merged: " in capsys.readouterr().err
    name = "model.layers.{}.mlp.up_proj.weight"
    merged = Checkpoint.open(path, merge_adapter=True)
    cut = load_file(tmp_path / "cut" / "model.safetensors")
    source = load_file(path / "model.safetensors")
    whole = load_file(merged.path / "model.safetensors")
    assert cut[name.format(1)].equal(whole[name.format(2)])
    assert not cut[name.format(1)].equal(source[name.format(2)])
