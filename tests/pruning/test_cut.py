"""Cuts against stock transformers: the source model with the removed blocks doing nothing."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from naive import accounted as stock
from places import place
from shearling.errors import ShearlingError
from shearling.files import writer
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.cut import cut
from shearling.pruning.proof import prove
from shearling.table.families import Family
from shearling.table.values import Keep

Models = Callable[[str], Path]

# shearling.pruning.cut is the verb; this is the module it lives in.
module: Any = import_module("shearling.pruning.cut")

REMOVED, KEPT = (0, 3), (1, 2, 4)
KEEP = Keep({"layers": KEPT})


@pytest.fixture(scope="session")
def pruned(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Variant -> its model cut to three of five blocks."""
    root = tmp_path_factory.mktemp("pruned")

    def directory(variant: str) -> Path:
        path = root / variant
        if not path.is_dir():
            cut(Checkpoint.open(models(variant)), KEEP, path)
        return path

    return directory


def blocks_of(model: nn.Module, depth: int = 5) -> nn.ModuleList:
    """The one list of as many modules as there are blocks."""
    (blocks,) = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    return blocks


def without(model: Any, removed: Iterable[int]) -> Any:
    """The same model, whose removed blocks hand on what they are given."""
    for index in removed:
        blocks_of(model)[index].forward = lambda hidden_states, *_, **__: hidden_states
    return model


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def contents(directory: Path) -> dict[str, tuple[int, int, str]]:
    """Everything about a directory that writing to it would change."""
    return {
        str(path.relative_to(directory)): (
            path.stat().st_mtime_ns,
            path.stat().st_mode,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in (directory, *directory.rglob("*"))
    }


def manifest_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "shearling.json").read_text(encoding="utf-8"))


# --- depth, for every family ---------------------------------------------------------------------


def test_logits_are_those_of_the_source_without_the_blocks(
    models: Models, pruned: Models, variant: str, ids: Tensor
) -> None:
    found = logits(stock(pruned(variant)), ids)
    whole = stock(models(variant))
    unpruned = logits(whole, ids)
    expected = logits(without(whole, REMOVED), ids)
    assert relative(found, expected) < 1e-5
    assert relative(unpruned, expected) > 1e-2, "the removed blocks do nothing: a test of nothing"


def test_generation_with_a_cache_is_generation_without(
    pruned: Models, variant: str, ids: Tensor
) -> None:
    """A block that kept its old number would read another one's cache."""
    model = stock(pruned(variant))
    expected = ids[:2]
    for _ in range(12):
        following = logits(model, expected)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, following], dim=1)
    model.generation_config.eos_token_id = None
    found = model.generate(ids[:2], max_new_tokens=12, do_sample=False, use_cache=True)
    assert torch.equal(found, expected)


def test_every_tensor_is_the_source_s_bit_for_bit(
    models: Models, pruned: Models, variant: str
) -> None:
    source = load_file(models(variant) / "model.safetensors")
    numbers = {old: new for new, old in enumerate(KEPT)}
    expected = {}
    for name, tensor in source.items():
        number = re.search(r"\.layers\.(\d+)\.", name)
        if number is None:
            expected[name] = tensor
        elif int(number[1]) in numbers:
            new = numbers[int(number[1])]
            expected[name.replace(number[0], f".layers.{new}.")] = tensor
    found = load_file(pruned(variant) / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_manifest_says_what_was_done(models: Models, pruned: Models, variant: str) -> None:
    path = pruned(variant)
    manifest, tensors = manifest_of(path), load_file(path / "model.safetensors")
    source, result = Checkpoint.open(models(variant)), Checkpoint.open(path)
    assert (manifest["kind"], manifest["stage"]) == ("manifest", "prune")
    assert manifest["keep"] == {"layers": [1, 2, 4]}
    assert manifest["model"] == {"name": variant, "fingerprint": result.fingerprint}
    assert manifest["source"] == {
        "name": variant,
        "fingerprint": source.fingerprint,
        "shape": dict(source.shape),
        "parameters": sum(p.numel() for p in stock(models(variant)).parameters()),
        "bytes": sum(t.nbytes for t in load_file(models(variant) / "model.safetensors").values()),
    }
    assert manifest["source_shape"] == dict(source.shape)
    assert manifest["shape"] == dict(source.shape) | {"layers": 3}
    assert manifest["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert manifest["parameters"] == sum(p.numel() for p in stock(path).parameters())
    assert manifest["source_parameters"] == manifest["source"]["parameters"]
    assert manifest["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert manifest["files"] == {
        "model.safetensors": hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    }
    proof = manifest["proof"]
    assert proof["passed"] is True
    assert proof["max_relative_difference"] <= 1e-5
    assert (proof["tokens"], proof["loaded_with"]) == (64, "AutoModelForCausalLM")
    assert manifest["parent"] is None
    assert set(manifest["versions"]) == {
        "python",
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
    }


def test_the_source_is_not_touched(models: Models, variant: str, tmp_path: Path) -> None:
    before = contents(models(variant))
    cut(Checkpoint.open(models(variant)), Keep({"layers": (0, 4)}), tmp_path / "out")
    assert contents(models(variant)) == before


def test_a_streamed_proof_is_the_same(models: Models, pruned: Models, variant: str) -> None:
    source, written = Checkpoint.open(models(variant)), Checkpoint.open(pruned(variant))
    streamed = prove(source, KEEP, written, place=place(False))
    assert streamed.passed
    assert streamed.loaded_with == "block by block"
    assert streamed.max_relative_difference <= 1e-5
    # It can fail: the same files are no cut to other blocks.
    other = prove(source, Keep({"layers": (1, 2, 3)}), written, place=place(False))
    assert not other.passed
    assert other.max_relative_difference > 1e-2


@pytest.mark.parametrize("variant", ["gemma2", "gemma3", "qwen2"])
@pytest.mark.parametrize("kept", [(0,), (1, 2), (2,), (0, 1, 3, 4)])
def test_block_types_survive_with_their_blocks(
    models: Models, variant: str, kept: tuple[int, ...], ids: Tensor, tmp_path: Path
) -> None:
    """Down to models that have but one type left."""
    cut(Checkpoint.open(models(variant)), Keep({"layers": kept}), tmp_path / "out")
    expected = logits(without(stock(models(variant)), {0, 1, 2, 3, 4} - set(kept)), ids)
    assert relative(logits(stock(tmp_path / "out"), ids), expected) < 1e-5


def test_a_cut_of_a_cut(models: Models, pruned: Models, ids: Tensor, tmp_path: Path) -> None:
    first = pruned("gemma2")
    result = cut(Checkpoint.open(first), Keep({"layers": (0, 2)}), tmp_path / "again")
    expected = logits(without(stock(models("gemma2")), (0, 2, 3)), ids)
    assert relative(logits(stock(result.path), ids), expected) < 1e-5
    manifest = manifest_of(result.path)
    assert manifest["parent"] == manifest_of(first)
    assert manifest["keep"] == {"layers": [0, 2]}, "in the numbering of its own source"
    assert manifest["source"]["fingerprint"] == manifest["parent"]["model"]["fingerprint"]
    original = Checkpoint.open(models("gemma2")).fingerprint
    assert manifest["parent"]["source"]["fingerprint"] == original


# --- files ---------------------------------------------------------------------------------------


def test_shards_load(models: Models, pruned: Models, variant: str, tmp_path: Path) -> None:
    source = Checkpoint.open(models(variant))
    result = cut(source, KEEP, tmp_path / "out", shard_bytes=20_000)
    files = sorted(path.name for path in result.path.glob("*.safetensors"))
    assert len(files) > 1
    found = {n: t for file in files for n, t in load_file(result.path / file).items()}
    expected = load_file(pruned(variant) / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    stock(result.path)
    manifest = manifest_of(result.path)
    assert manifest["files"] == {
        file: hashlib.sha256((result.path / file).read_bytes()).hexdigest() for file in files
    }
    assert manifest["model"]["fingerprint"] == manifest_of(pruned(variant))["model"]["fingerprint"]


def test_a_sharded_source(models: Models, ids: Tensor, tmp_path: Path) -> None:
    stock(models("gpt_neox")).save_pretrained(tmp_path / "source", max_shard_size="20KB")
    before = contents(tmp_path / "source")
    assert len(before) > 5
    result = cut(Checkpoint.open(tmp_path / "source"), KEEP, tmp_path / "out")
    expected = logits(without(stock(models("gpt_neox")), REMOVED), ids)
    assert relative(logits(stock(result.path), ids), expected) < 1e-5
    assert contents(tmp_path / "source") == before


@pytest.mark.parametrize("variant", ["llama-tied", "gemma3", "gpt_neox", "opt"])
def test_halves_stay_halves(models: Models, variant: str, tmp_path: Path) -> None:
    stock(models(variant)).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    source = load_file(tmp_path / "source" / "model.safetensors")
    result = cut(Checkpoint.open(tmp_path / "source"), Keep({"layers": (0, 1)}), tmp_path / "out")
    found = load_file(result.path / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, source[name]) for name, tensor in found.items())
    manifest = manifest_of(result.path)
    assert manifest["proof"]["passed"] is True
    assert manifest["bytes"] == 2 * manifest["parameters"]
    config = json.loads((result.path / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_types_may_differ_from_tensor_to_tensor(models: Models, tmp_path: Path) -> None:
    source = Path(shutil.copytree(models("llama"), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    mixed = {n: t if "norm" in n else t.to(torch.float16) for n, t in tensors.items()}
    save_file(mixed, source / "model.safetensors", metadata={"format": "pt"})
    result = cut(Checkpoint.open(source), Keep({"layers": (0, 1)}), tmp_path / "out")
    found = load_file(result.path / "model.safetensors")
    assert {n: t.dtype for n, t in found.items()} == {n: mixed[n].dtype for n in found}
    assert result.bytes == sum(tensor.nbytes for tensor in found.values())


def test_a_tied_head_that_is_stored_as_well_is_written_once(
    models: Models, pruned: Models, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(models("llama-tied"), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    result = cut(Checkpoint.open(source), KEEP, tmp_path / "out")
    assert "lm_head.weight" not in load_file(result.path / "model.safetensors")
    expected = (pruned("llama-tied") / "model.safetensors").read_bytes()
    assert (result.path / "model.safetensors").read_bytes() == expected


def test_old_buffers_are_not_carried_along(models: Models, pruned: Models, tmp_path: Path) -> None:
    source = Path(shutil.copytree(models("gpt_neox"), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    for i in range(5):
        tensors[f"gpt_neox.layers.{i}.attention.bias"] = torch.ones(1, 1, 64, 64)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    result = cut(Checkpoint.open(source), KEEP, tmp_path / "out")
    expected = (pruned("gpt_neox") / "model.safetensors").read_bytes()
    assert (result.path / "model.safetensors").read_bytes() == expected


def test_what_lies_beside_the_weights_is_copied_byte_for_byte(
    models: Models, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(models("llama"), tmp_path / "source"))
    beside = (
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE.txt",
        "NOTICE",
    )
    for name in beside:
        (source / name).write_bytes(f"{name}\r\n".encode() + b"\x00\xff")
    (source / "generation_config.json").write_text('{"eos_token_id":   2}')
    for name in ("README.md", "optimizer.pt", "pytorch_model.bin"):
        (source / name).write_text("x")
    (source / "tokenizer_files").mkdir()
    result = cut(Checkpoint.open(source), KEEP, tmp_path / "out")
    for name in beside:
        assert (result.path / name).read_bytes() == (source / name).read_bytes(), name
    own = {"config.json", "model.safetensors", "shearling.json"}
    assert {path.name for path in result.path.iterdir()} == own | set(beside)


def test_options_and_seed_are_written_down(models: Models, tmp_path: Path) -> None:
    options = {"criterion": "perplexity", "removed": [0, 3]}
    source = Checkpoint.open(models("llama"))
    result = cut(source, KEEP, tmp_path / "out", options=options, seed=7)
    manifest = manifest_of(result.path)
    assert manifest["options"] == options
    assert manifest["seed"] == 7


def test_a_result_can_be_read_by_whom_the_umask_allows(models: Models, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        result = cut(Checkpoint.open(models("llama")), KEEP, tmp_path / "out")
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in result.path.iterdir()} == {"0o644"}


def test_a_link_as_output(models: Models, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    cut(Checkpoint.open(models("llama")), KEEP, tmp_path / "link")
    assert manifest_of(tmp_path / "disk")["model"]["name"] == "disk"
    assert Checkpoint.open(tmp_path / "link").name == "disk"


# --- failures ------------------------------------------------------------------------------------

_BLOCK = "model.layers.1."
_ROWS = tuple(
    f"{_BLOCK}{name}.weight"
    for name in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
        "input_layernorm",
        "post_attention_layernorm",
    )
)


@pytest.mark.parametrize(
    "name", [*_ROWS, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
)
def test_the_proof_notices_any_damaged_tensor(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    load = module._load

    def damaged(*args: Any) -> dict[str, Tensor]:
        tensors = load(*args)
        tensors[name] = tensors[name] * 1.01
        return tensors

    monkeypatch.setattr(module, "_load", damaged)
    with pytest.raises(ShearlingError, match="proof of surgery failed") as error:
        cut(Checkpoint.open(models("llama")), KEEP, tmp_path / "out")
    assert str(tmp_path / "out") in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stream", [False, True])
def test_the_proof_notices_swapped_blocks(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    load = module._load

    def swapped(*args: Any) -> dict[str, Tensor]:
        tensors = load(*args)
        for name in list(tensors):
            if ".layers.0." in name:
                other = name.replace(".layers.0.", ".layers.1.")
                tensors[name], tensors[other] = tensors[other], tensors[name]
        return tensors

    monkeypatch.setattr(module, "_load", swapped)
    with pytest.raises(ShearlingError, match="proof of surgery failed"):
        cut(Checkpoint.open(models("llama")), KEEP, tmp_path / "out", place=place(not stream))
    assert list(tmp_path.iterdir()) == []


def test_the_proof_notices_a_configuration_that_does_not_fit(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block types of other blocks, which transformers itself accepts."""
    write = Family.write

    def wrong(family: Family, raw: Any, config: Any, shape: Any, _: object) -> dict[str, Any]:
        return write(family, raw, config, shape, (0, 1, 3))

    monkeypatch.setattr(Family, "write", wrong)
    with pytest.raises(ShearlingError, match="proof of surgery failed"):
        cut(Checkpoint.open(models("gemma2")), KEEP, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_that_transformers_refuses_leaves_nothing(
    models: Models, tmp_path: Path
) -> None:
    source = Checkpoint.open(models("gemma2"))
    family = dataclasses.replace(source.family, per_layer=())
    with pytest.raises(ShearlingError, match="refused by transformers"):
        cut(dataclasses.replace(source, family=family), KEEP, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_prove_nothing(
    models: Models, tmp_path: Path, value: float
) -> None:
    source = Path(shutil.copytree(models("llama"), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ShearlingError, match=r"^the tensor model\.norm\.weight of"):
        cut(Checkpoint.open(source), KEEP, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_leaves_nothing(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = writer.save_file, []

    def second_fails(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(*args, **kwargs)

    monkeypatch.setattr(writer, "save_file", second_fails)
    before = contents(models("llama"))
    with pytest.raises(ShearlingError, match="disk ran full"):
        cut(Checkpoint.open(models("llama")), KEEP, tmp_path / "out", shard_bytes=20_000)
    assert list(tmp_path.iterdir()) == []
    assert contents(models("llama")) == before


def test_too_little_space_is_refused_before_any_work(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, free = Checkpoint.open(models("llama")), Checkpoint.open(models("llama")).bytes // 2
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(module, "write_weights", None)
    with pytest.raises(ShearlingError, match="free some space"):
        cut(source, KEEP, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_taken_is_refused_before_any_work(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").write_text("x")
    monkeypatch.setattr(module, "write_weights", None)
    with pytest.raises(ShearlingError, match="not empty"):
        cut(Checkpoint.open(models("llama")), KEEP, tmp_path)
    source = Checkpoint.open(Path(shutil.copytree(models("llama"), tmp_path / "source")))
    before = contents(source.path)
    with pytest.raises(ShearlingError, match="not empty"):
        cut(source, KEEP, source.path)
    assert contents(source.path) == before


@pytest.mark.parametrize("stage", ["writing weights", "proving the cut"])
def test_an_interrupt_leaves_nothing(models: Models, tmp_path: Path, stage: str) -> None:
    seen = []

    def interrupt(at: str, done: float, total: float) -> None:
        seen.append(at)
        assert 0 <= done <= total
        if at == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut(Checkpoint.open(models("llama")), KEEP, tmp_path / "out", progress=interrupt)
    assert stage in seen
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layers", [(), (0, 5), (1, 0), (2, 2)])
def test_impossible_keeps_are_refused(
    models: Models, tmp_path: Path, layers: tuple[int, ...]
) -> None:
    with pytest.raises(ShearlingError, match="layers"):
        cut(Checkpoint.open(models("llama")), Keep({"layers": layers}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_corrupt_manifest_beside_the_source(models: Models, tmp_path: Path) -> None:
    source = Path(shutil.copytree(models("llama"), tmp_path / "source"))
    (source / "shearling.json").write_text("{")
    with pytest.raises(ShearlingError, match=r"shearling\.json is not valid JSON"):
        cut(Checkpoint.open(source), KEEP, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# --- width: the table alone -----------------------------------------------------------------------


def table_cut(checkpoint: Checkpoint, keep: Keep) -> dict[str, Tensor]:
    expanded = checkpoint.layout.cut(keep, checkpoint.shape)
    return module._load(checkpoint, expanded, [s.target for s in expanded.selections], {})


def save(checkpoint: Checkpoint, keep: Keep, directory: Path) -> Path:
    after = checkpoint.layout.cut(keep, checkpoint.shape).after
    layers = keep.model.get("layers", (0, 1, 2, 3, 4))
    raw = checkpoint.family.write(checkpoint.raw, checkpoint.config, after, layers)
    (directory / "config.json").write_text(json.dumps(raw))
    tensors = {name: tensor.contiguous() for name, tensor in table_cut(checkpoint, keep).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    Checkpoint.open(directory)
    return directory


def silence(matrix: nn.Linear, columns: set[int]) -> None:
    """Have a matrix ignore some of what it reads."""
    with torch.no_grad():
        matrix.weight[:, sorted(columns)] = 0


_MLP_OUT = ("mlp.down_proj", "mlp.dense_4h_to_h", "fc2", "shared_mlp.output_linear")


def test_removed_neurons_are_silenced_neurons(
    models: Models, variant: str, ids: Tensor, tmp_path: Path
) -> None:
    """Each block loses neurons of its own, and two blocks go altogether."""
    neurons = tuple(tuple(sorted((7 * i + 3 * j) % 50 for j in range(13))) for i in range(3))
    keep = Keep({"layers": KEPT}, {"mlp": neurons})
    found = logits(stock(save(Checkpoint.open(models(variant)), keep, tmp_path)), ids)
    source = without(stock(models(variant)), REMOVED)
    for number, kept in zip(KEPT, neurons, strict=True):
        block = blocks_of(source)[number]
        (name,) = (n for n in _MLP_OUT if n in dict(block.named_modules()))
        silence(block.get_submodule(name), set(range(50)) - set(kept))
    assert relative(found, logits(source, ids)) < 1e-5


_GROUPS = {
    "groups": {"kv_heads": ((0, 2), (1, 2), (0, 1), (0, 2), (1, 2))},
    "heads": {
        "heads": (
            (0, 1, 3, 5, 7, 8),
            (0, 2, 4, 5, 6, 8),
            (1, 2, 3, 4, 6, 7),
            (0, 1, 3, 4, 6, 7),
            (1, 2, 4, 5, 7, 8),
        )
    },
    "both": {
        "kv_heads": ((2,), (0,), (1,), (2,), (0,)),
        "heads": ((6, 7, 8), (0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 1, 2)),
    },
    "one head a group": {"heads": ((0, 4, 8), (2, 3, 6), (1, 5, 7), (0, 3, 6), (2, 5, 8))},
}


@pytest.mark.parametrize("blocks", _GROUPS.values(), ids=_GROUPS)
@pytest.mark.parametrize(
    "variant", ["llama", "llama-biases", "mistral", "qwen3", "gemma2", "gemma3"]
)
def test_removed_heads_are_silenced_heads(
    models: Models,
    variant: str,
    blocks: dict[str, tuple[tuple[int, ...], ...]],
    ids: Tensor,
    tmp_path: Path,
) -> None:
    checkpoint = Checkpoint.open(models(variant))
    found = logits(stock(save(checkpoint, Keep(blocks=blocks), tmp_path)), ids)
    source, width = stock(models(variant)), checkpoint.shape["head_dim"]
    for i, block in enumerate(blocks_of(source)):
        heads = (
            blocks["heads"][i]
            if "heads" in blocks
            else [head for head in range(9) if head // 3 in blocks["kv_heads"][i]]
        )
        dead = {h * width + j for h in range(9) if h not in heads for j in range(width)}
        silence(block.get_submodule("self_attn.o_proj"), dead)
    assert relative(found, logits(source, ids)) < 1e-5


def test_fused_tensors_are_cut_part_by_part(models: Models) -> None:
    """Phi-3: queries, keys and values one after the other, then gate and up."""
    checkpoint = Checkpoint.open(models("phi3"))
    groups = ((0, 2), (1, 2), (0, 1), (0, 1), (0, 2))
    neurons = tuple(tuple(range(i, 50, 4))[:12] for i in range(5))
    found = table_cut(checkpoint, Keep(blocks={"kv_heads": groups, "mlp": neurons}))
    source = load_file(models("phi3") / "model.safetensors")
    for i, (kept, mlp) in enumerate(zip(groups, neurons, strict=True)):
        block = f"model.layers.{i}"
        qkv = source[f"{block}.self_attn.qkv_proj.weight"]
        query, key, value = qkv[:36], qkv[36:48], qkv[48:60]
        heads = [3 * group + each for group in kept for each in range(3)]
        expected = torch.cat(
            [
                *(query[4 * head : 4 * head + 4] for head in heads),
                *(key[4 * group : 4 * group + 4] for group in kept),
                *(value[4 * group : 4 * group + 4] for group in kept),
            ]
        )
        assert torch.equal(found[f"{block}.self_attn.qkv_proj.weight"], expected)
        out = source[f"{block}.self_attn.o_proj.weight"]
        expected = torch.cat([out[:, 4 * head : 4 * head + 4] for head in heads], dim=1)
        assert torch.equal(found[f"{block}.self_attn.o_proj.weight"], expected)
        gate, up = source[f"{block}.mlp.gate_up_proj.weight"].chunk(2)
        expected = torch.stack([gate[n] for n in mlp] + [up[n] for n in mlp])
        assert torch.equal(found[f"{block}.mlp.gate_up_proj.weight"], expected)
        expected = source[f"{block}.mlp.down_proj.weight"][:, list(mlp)]
        assert torch.equal(found[f"{block}.mlp.down_proj.weight"], expected)


def test_interleaved_tensors_are_cut_head_by_head(models: Models) -> None:
    """GPT-NeoX: query, key and value of head 0, then those of head 1, ..."""
    checkpoint = Checkpoint.open(models("gpt_neox"))
    heads = ((0, 4, 8), (1, 2, 3), (0, 1, 8), (5, 6, 7), (2, 4, 6))
    found = table_cut(checkpoint, Keep(blocks={"heads": heads}))
    source = load_file(models("gpt_neox") / "model.safetensors")
    for i, kept in enumerate(heads):
        block = f"gpt_neox.layers.{i}.attention"
        for leaf in ("weight", "bias"):
            whole = source[f"{block}.query_key_value.{leaf}"]
            expected = torch.cat([whole[12 * head : 12 * head + 12] for head in kept])
            assert torch.equal(found[f"{block}.query_key_value.{leaf}"], expected)
        dense = source[f"{block}.dense.weight"]
        expected = torch.cat([dense[:, 4 * head : 4 * head + 4] for head in kept], dim=1)
        assert torch.equal(found[f"{block}.dense.weight"], expected)
        assert torch.equal(found[f"{block}.dense.bias"], source[f"{block}.dense.bias"])


_THROUGH_WHICH_GEMMA_WRITES = ("post_attention_layernorm", "post_feedforward_layernorm")


def test_the_residual_stream_is_cut_everywhere(models: Models, variant: str) -> None:
    """Every side of a tensor that is 36 wide lies on the residual stream, but for attention's."""
    checkpoint = Checkpoint.open(models(variant))
    kept = [0, 1, 5, 8, 13, 21, 34]
    found = table_cut(checkpoint, Keep({"hidden": tuple(kept)}))
    source = load_file(models(variant) / "model.safetensors")
    assert found.keys() == source.keys()
    # In what is named so, rows (0) or columns (1) are heads or neurons; all else follows.
    heads_on = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "out_proj": 1}
    heads_on |= {"qkv_proj": 0, "query_key_value": 0, "dense": 1, "q_norm": 0, "k_norm": 0}
    for name, tensor in source.items():
        owner = name.split(".")[-2]
        expected = tensor
        for dim, size in enumerate(tensor.shape):
            if size == 36 and heads_on.get(owner) != dim:
                expected = expected.index_select(dim, torch.tensor(kept))
        if variant in ("gemma2", "gemma3") and owner in _THROUGH_WHICH_GEMMA_WRITES:
            # The stock code scales embeddings by sqrt(7) now, where it was by sqrt(36).
            scaled = (1 + expected) * (7 / 36) ** 0.5 - 1
            assert torch.allclose(found[name], scaled, rtol=1e-6, atol=1e-7), name
        else:
            assert torch.equal(found[name], expected), name
