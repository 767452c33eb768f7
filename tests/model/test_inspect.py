"""What a model is said to be, against what it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from shearling.model.checkpoint import Checkpoint
from shearling.model.inspect import _ranges, comparison, inspect, lines
from shearling.pruning.cut import cut
from shearling.table.values import Keep

Models = Callable[[str], Path]


def test_the_figures_are_those_of_the_files(models: Models, variant: str) -> None:
    tensors = load_file(models(variant) / "model.safetensors")
    found = inspect(Checkpoint.open(models(variant)))
    inside = sum(tensor.numel() for name, tensor in tensors.items() if ".layers." in name)
    assert found["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert found["parameters_in_blocks"] == inside
    assert found["parameters_per_block"] * 5 == inside
    assert found["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert found["tied_embeddings"] is (not {"lm_head.weight", "embed_out.weight"} & tensors.keys())
    assert found["dtypes"] == ["F32"]
    assert found["architecture"] in variant.replace("gemma3", "gemma3_text")
    assert found["name"] == variant
    assert found["path"] == str(models(variant))
    assert found["manifest"] is None
    assert {"layers", "hidden", "heads", "mlp"} <= set(found["prunable_axes"])
    assert not {"head_dim", "positions", "embed"} & set(found["prunable_axes"])


def test_costs_in_closed_form(models: Models) -> None:
    found = inspect(Checkpoint.open(models("llama")))
    block = 36 * 6 * (9 + 3 + 3 + 9) + 3 * 36 * 50
    attention = 2 * 9 * 6 * 1024
    assert found["flops_context"] == 1024
    assert found["flops_per_token"] == 2 * (5 * (block + attention) + 101 * 36)
    assert found["kv_cache_bytes_per_token"] == 2 * 5 * 3 * 6 * 2


def test_lines_for_a_person(models: Models) -> None:
    checkpoint = Checkpoint.open(models("llama-tied"))
    text = "\n".join(lines(inspect(checkpoint)))
    assert text.startswith("llama-tied (llama, F32)\n")
    assert "layers=5, hidden=36, vocab=101, heads=9, kv_heads=3, mlp=50, head_dim=4" in text
    assert f"{checkpoint.parameters:,} (" in text
    assert f"{checkpoint.bytes / 1e3:.1f} kB" in text
    assert checkpoint.fingerprint[:16] in text
    assert "tied: one storage, counted once" in text
    assert "made from" not in text
    assert "tied" not in "\n".join(lines(inspect(Checkpoint.open(models("llama")))))


def test_the_lineage_of_a_cut_of_a_cut(models: Models, tmp_path: Path) -> None:
    source = Checkpoint.open(models("llama"))
    first = cut(source, Keep({"layers": (0, 1, 3, 4)}), tmp_path / "first")
    second = cut(first, Keep({"layers": (0, 2, 3)}), tmp_path / "second")
    found = inspect(second)
    assert found["manifest"]["parent"]["source"]["fingerprint"] == source.fingerprint
    made = [line for line in lines(found) if "made from" in line]
    assert [line.split()[2:4] for line in made] == [
        ["first", f"{first.fingerprint[:16]},"],
        ["llama", f"{source.fingerprint[:16]},"],
    ]
    assert made[0].endswith(f"{first.parameters:,} parameters, blocks 0, 2-3 kept")
    assert made[1].endswith(f"{source.parameters:,} parameters, blocks 0-1, 3-4 kept")


def test_before_and_after_without_running_anything(models: Models, tmp_path: Path) -> None:
    source = Checkpoint.open(models("gpt_neox"))
    shape = source.shape.with_(layers=3)
    found = comparison(source, shape)
    result = cut(source, Keep({"layers": (0, 1, 2)}), tmp_path / "out")
    assert found["figures"] == {
        "source_shape": dict(source.shape),
        "shape": dict(result.shape),
        "source_parameters": source.parameters,
        "parameters": result.parameters,
    }
    change = result.parameters / source.parameters - 1
    assert f"{source.parameters:,} -> {result.parameters:,} ({change:+.1%})" in found["text"][1]
    assert found["text"][0].split() == ["blocks", "5", "->", "3"]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([0], "0"),
        ([3, 4], "3-4"),
        ([0, 2, 4], "0, 2, 4"),
        ([0, 1, 2, 5], "0-2, 5"),
        ([1, 3, 4, 5, 8, 9], "1, 3-5, 8-9"),
    ],
)
def test_ranges(numbers: list[int], text: str) -> None:
    assert _ranges(numbers) == text
