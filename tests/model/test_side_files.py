"""What lies beside a model's weights, and goes with every model made from it, or never does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from shearling.model.checkpoint import Checkpoint
from shearling.model.loading import load_tokenizer
from shearling.model.side_files import HUB, HUB_NEVER, copy_side_files, side_files, tokenizer_files
from shearling.pruning.cut import cut
from shearling.ship.quantize import plan, quantize
from shearling.table.values import Keep
from shearling.train.heal import heal
from shearling.train.options import Options
from tiny_store import write_store
from tiny_tokenizer import write_llama

GOES = (
    "tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tokenizer_config.json",
    "tekken.json", "qwen.tiktoken", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json",
    "spiece.model", "sentencepiece.bpe.model", "special_tokens_map.json", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates/tool_use.jinja", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "LICENSE", "LICENSE.txt", "LICENCE.md",
    "NOTICE", "USE_POLICY.md",
)  # fmt: skip
STAYS = (
    "pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth",
    "consolidated.safetensors", "tf_model.h5", "flax_model.msgpack", "model.onnx", "old.gguf",
    "model.pt", "last.ckpt", "model.safetensors", "model.safetensors.index.json", "tokenizer.bin",
    "modeling_custom.py", "tokenizer_custom.py", "chat_template.py", "vocab.pkl",
    "adapter_config.json", "adapter_model.safetensors", "training_args.bin", "trainer_state.json",
    "optimizer.pt", "rng_state.pth", "config.json", "shearling.json", "README.md", ".gitattributes",
    "additional_chat_templates/run.py", "original/tokenizer.model",
)  # fmt: skip


def plant(directory: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(f"what {name} holds \xff".encode("latin-1"))


def names(directory: Path) -> set[str]:
    return {
        file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file()
    }


def test_what_is_copied_and_what_never_is(tmp_path: Path) -> None:
    (source := tmp_path / "source").mkdir()
    (target := tmp_path / "target").mkdir()
    plant(source, GOES + STAYS)
    assert {file.relative_to(source).as_posix() for file in side_files(source)} == set(GOES)
    copy_side_files(source, target)
    assert names(target) == set(GOES)
    for name in GOES:
        assert (target / name).read_bytes() == (source / name).read_bytes()


def test_a_cut_vocabulary_leaves_the_old_one_behind(tmp_path: Path) -> None:
    (source := tmp_path / "source").mkdir()
    (target := tmp_path / "target").mkdir()
    plant(source, GOES)
    copy_side_files(source, target, tokenizer=False)
    tokenizer = {file.name for file in tokenizer_files(source)}
    assert names(target) == set(GOES) - tokenizer
    assert {"tokenizer.json", "tekken.json", "qwen.tiktoken", "spiece.model"} <= tokenizer


def test_names_of_code_are_not_copied(tmp_path: Path) -> None:
    (source := tmp_path / "source").mkdir()
    (target := tmp_path / "target").mkdir()
    raw = {
        "tokenizer_class": "Odd",
        "auto_map": {"AutoTokenizer": [None, "odd.Odd"]},
        "é": "\ue000",
    }
    (source / "tokenizer_config.json").write_text(json.dumps(raw))
    copy_side_files(source, target)
    assert json.loads((target / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "Odd", "é": "\ue000",
    }  # fmt: skip


def healed(source: Checkpoint, place: Path) -> Path:
    (place / "text").mkdir()
    store = write_store(place / "text")
    options = Options.model_validate({"tokens": 200, "batch": 2, "eval_sequences": 1})
    heal(source, store, options, place / "healed")
    return place / "healed"


def pruned(source: Checkpoint, place: Path) -> Path:
    return cut(source, Keep({"layers": (0,)}), place / "pruned").path


def quantized(source: Checkpoint, place: Path) -> Path:
    if find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    quantize(source, place / "quantized", plan(source, "int8"))
    return place / "quantized"


@pytest.mark.parametrize("make", [healed, pruned, quantized])
def test_every_stage_copies_the_same(
    make: Callable[[Checkpoint, Path], Path], tmp_path: Path
) -> None:
    path = write_llama(tmp_path / "source", layers=2)
    own = names(path)
    more = tuple(name for name in (*GOES, *STAYS) if name not in own and "index" not in name)
    # What is read on the way has to be what it says it is.
    read = ("added_tokens", "special_tokens_map", "vocab.json", "shearling", "template", "adapter")
    plant(path, tuple(name for name in more if not any(part in name for part in read)))
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (path / "chat_template.jinja").write_text("{{ bos_token }}")
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_custom.Model"}
    config |= {"_attn_implementation": "flash_attention_2", "attn_implementation": "eager"}
    (path / "config.json").write_text(json.dumps(config))
    output = make(Checkpoint.open(path), tmp_path)
    shutil.rmtree(output / "healing", ignore_errors=True)
    went = {name for name in names(path) if name in GOES}
    assert {"tekken.json", "additional_chat_templates/tool_use.jinja"} <= went
    templates = {"default": "{{ bos_token }}", "tool_use": "{{ messages }}"}
    assert load_tokenizer(output).chat_template == templates
    assert names(output) == went | {"config.json", "model.safetensors", "shearling.json"}
    written = json.loads((output / "config.json").read_text())
    assert not {"auto_map", "_attn_implementation", "attn_implementation"} & written.keys()


def test_what_is_fetched_from_the_hub() -> None:
    from huggingface_hub.utils import filter_repo_objects

    weights = ("model.safetensors", "model.safetensors.index.json", "model-00001-of-2.safetensors")
    fetched = {*weights, *GOES, "config.json", "adapter_config.json", "adapter_model.safetensors",
               "shearling.json", "pytorch_model.bin.index.json"}  # fmt: skip
    others = ("original/model.safetensors", "onnx/model.onnx", "pytorch_model-00001-of-2.bin",
              "adapter_model.bin", "checkpoint-7/model.safetensors", "metal/model.bin")  # fmt: skip
    offered = [*fetched, *STAYS, *others]
    got = filter_repo_objects(offered, allow_patterns=[*HUB], ignore_patterns=[*HUB_NEVER])
    assert set(got) == fetched
