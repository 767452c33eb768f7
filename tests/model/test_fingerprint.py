"""A fingerprint tells models apart by every byte, and by nothing else."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shearling.errors import ShearlingError
from shearling.files import remembered
from shearling.model import fingerprint as module
from shearling.model.checkpoint import Checkpoint
from shearling.model.fingerprint import fingerprint, tensor_digests


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHEARLING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fingerprints"


@pytest.fixture
def copy(models, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models("llama"), tmp_path / "copy"))


def settle(file: Path) -> None:
    """Let a file be as old as it has to be to be trusted."""
    old = file.stat().st_mtime - 100
    os.utime(file, (old, old))


def flip(file: Path, place: int) -> None:
    """Change one bit of a file."""
    with file.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("share", [0.05, 0.5, 0.999])
def test_one_bit_anywhere_makes_another_model(models, copy: Path, share: float) -> None:
    weights = copy / "model.safetensors"
    assert Checkpoint.open(copy).fingerprint == Checkpoint.open(models("llama")).fingerprint
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    flip(weights, header + int(share * (weights.stat().st_size - header)))
    assert Checkpoint.open(copy).fingerprint != Checkpoint.open(models("llama")).fingerprint


def test_every_byte_counts(tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    tensors = {"a": torch.arange(6, dtype=torch.int16).view(2, 3), "b": torch.ones(3).bfloat16()}
    save_file(tensors, file)
    files = dict.fromkeys(tensors, file)
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    found = {fingerprint({}, files)}
    for place in range(header, file.stat().st_size):
        flip(file, place)
        found.add(fingerprint({}, files))
        flip(file, place)
    assert len(found) == 1 + 12 + 6


def test_shards_and_names_of_files_do_not_count(models, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(tensors, reverse=True)
    weight_map: dict[str, str] = {}
    for number in range(3):
        shard = {name: tensors[name] for name in names[number::3]}
        save_file(shard, copy / f"part-{number}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, f"part-{number}.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert Checkpoint.open(copy).fingerprint == Checkpoint.open(models("llama")).fingerprint


def test_names_types_and_shapes_count(tmp_path: Path) -> None:
    zeros = torch.zeros(4, dtype=torch.float16)
    kinds = [{"a": zeros}, {"b": zeros}, {"a": zeros.bfloat16()}, {"a": zeros.view(2, 2)}]
    found = set()
    for number, tensors in enumerate(kinds):
        save_file(tensors, tmp_path / f"{number}.safetensors")
        found.add(fingerprint({}, dict.fromkeys(tensors, tmp_path / f"{number}.safetensors")))
    file = tmp_path / "0.safetensors"
    found.add(fingerprint({"hidden_size": 4}, {"a": file}))
    assert len(found) == len(kinds) + 1


def test_a_file_is_read_once(copy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "SETTLED_SECONDS", 0.0)
    first = Checkpoint.open(copy).fingerprint
    assert len(list(cache.iterdir())) == 1
    (moved := copy.with_name("moved")).exists()
    copy.rename(moved)
    monkeypatch.setattr(module, "_digest", None)  # nothing is read now
    assert Checkpoint.open(moved).fingerprint == first


def test_a_change_is_seen_though_the_time_is_set_back(
    copy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "SETTLED_SECONDS", 0.0)
    weights = copy / "model.safetensors"
    settle(weights)
    before, stat = Checkpoint.open(copy).fingerprint, weights.stat()
    time.sleep(0.05)  # more than a tick of the file system's clock
    flip(weights, stat.st_size // 2)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = weights.stat()
    assert (after.st_mtime_ns, after.st_size) == (stat.st_mtime_ns, stat.st_size)
    assert Checkpoint.open(copy).fingerprint != before


def test_nothing_is_kept_of_a_file_that_has_just_changed(copy: Path, cache: Path) -> None:
    weights = copy / "model.safetensors"
    os.utime(weights)
    Checkpoint.open(copy).fingerprint  # noqa: B018
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["", "[]", '{"tensors": 1}'])
def test_a_damaged_cache_is_none(
    copy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(remembered, "SETTLED_SECONDS", 0.0)
    before = Checkpoint.open(copy).fingerprint
    for file in cache.iterdir():
        file.write_text(damage)
    assert Checkpoint.open(copy).fingerprint == before


def test_a_cache_that_cannot_be_written_stops_nothing(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "SETTLED_SECONDS", 0.0)
    (tmp_path / "file").touch()
    before = Checkpoint.open(copy).fingerprint
    monkeypatch.setenv("SHEARLING_CACHE", str(tmp_path / "file"))
    assert Checkpoint.open(copy).fingerprint == before


def test_a_truncated_file_is_refused(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ShearlingError, match="truncated or corrupt"):
        tensor_digests([weights])
