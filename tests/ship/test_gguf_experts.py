"""A file that holds the matrices of all experts in one is compared expert by expert.

Written by hand with the gguf package; llama.cpp's own converter is tried in test_gguf.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.ship.computes import check_counted
from shearling.ship.readback import prove

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
Stack = Callable[[list[torch.Tensor]], list[torch.Tensor]]


def stacked(path: Path, file: Path, change: Stack) -> Path:
    """A GGUF file of a tiny Qwen 3 with experts; ``change`` gives those of each matrix."""
    checkpoint = Checkpoint.open(path)
    shape = checkpoint.shape
    writer = gguf.GGUFWriter(file, "qwen3moe")
    writer.add_block_count(shape["layers"])
    writer.add_embedding_length(shape["hidden"])
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_key_length(shape["head_dim"])
    writer.add_expert_count(shape["experts"])
    writer.add_expert_feed_forward_length(shape["expert_mlp"])
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, shape["layers"])
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in checkpoint.read(checkpoint.files):
        before, _, after = name.partition(".experts.")
        if after:
            number, matrix = after.split(".", 1)
            experts.setdefault(f"{before}.experts.{matrix}", {})[int(number)] = tensor
        else:
            writer.add_tensor(table.get_name(name, (".weight", ".bias")), tensor.numpy())
    for name, of in experts.items():
        rows = change([of[number] for number in sorted(of)])
        writer.add_tensor(table.get_name(name, (".weight",)), torch.stack(rows).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_every_expert_is_found_in_its_place(models, tmp_path):
    found = prove(
        Checkpoint.open(models("qwen3_moe")),
        stacked(models("qwen3_moe"), tmp_path / "a.gguf", lambda rows: rows),
    )
    assert found.exact == found.tensors
    assert found.architecture == "qwen3moe"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [*rows[1:], rows[0]], r"stores other values for .*experts\.0\."),
        (lambda rows: rows[:-1], r"as \[4, .*\] instead of \[5, "),
    ],
)
def test_experts_in_another_order_or_number_are_refused(models, tmp_path, change, message):
    file = stacked(models("qwen3_moe"), tmp_path / "a.gguf", change)
    with pytest.raises(ShearlingError, match=message):
        prove(Checkpoint.open(models("qwen3_moe")), file)


def test_blocks_without_positions_that_llama_cpp_would_not_count_are_refused(models, tmp_path):
    """It leaves every fourth of a SmolLM 3 without, wherever they were before a cut."""
    path = Path(shutil.copytree(models("smollm3"), tmp_path / "model"))
    for rotated, refused in (([1, 1, 1, 0, 1], None), ([1, 1, 0, 1, 1], "block 2 with them")):
        file = path / "config.json"
        raw = json.loads(file.read_text()) | {"no_rope_layers": rotated}
        file.write_text(json.dumps(raw))
        checkpoint = Checkpoint.open(path)
        if refused is None:
            check_counted(checkpoint)
        else:
            with pytest.raises(ShearlingError, match=f"{refused}, which is without them here"):
                check_counted(checkpoint)
