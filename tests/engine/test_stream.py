"""A model run block by block is the stock model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

import naive
from places import place
from shearling.engine.place import Place
from shearling.engine.stream import BlockStream
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint

Models = Callable[[str], Path]


def on_meta(stream: BlockStream) -> bool:
    return all(t.is_meta for shell in stream.shells for t in shell.state_dict().values())


def walk(stream: BlockStream, ids_BS: Tensor) -> Tensor:
    """The state that leaves the last block."""
    h_BSD, calls = stream.begin(ids_BS)
    for index in range(stream.depth):
        with stream.block(index) as block:
            h_BSD = calls[index](block, h_BSD)
    return h_BSD


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).abs().max() / expected.abs().max()) <= 1e-5


@torch.no_grad()
def test_equals_the_stock_model(models: Models, variant: str, ids: Tensor) -> None:
    model = naive.stock(models(variant))
    logits = model(input_ids=ids, use_cache=False).logits
    nll = naive.token_nll(model, ids)
    found = {}
    for resident in (True, False):
        stream = BlockStream(Checkpoint.open(models(variant)), place(resident))
        h_BSD = found[resident] = walk(stream, ids)
        assert stream.depth == 5
        assert close(stream.logits(h_BSD, ids), logits)
        assert close(stream.nll(h_BSD, ids).double(), nll)
        assert on_meta(stream) is not resident
    assert torch.equal(found[True], found[False])


@torch.no_grad()
def test_every_block_and_the_head_matter(models: Models, variant: str, ids: Tensor) -> None:
    """Else the comparison above would prove little."""
    stream = BlockStream(Checkpoint.open(models(variant)), place(True))
    whole = stream.logits(walk(stream, ids), ids)
    for skipped in range(stream.depth):
        h_BSD, calls = stream.begin(ids)
        for index in set(range(stream.depth)) - {skipped}:
            with stream.block(index) as block:
                h_BSD = calls[index](block, h_BSD)
        assert not close(stream.logits(h_BSD, ids), whole)


@torch.no_grad()
def test_batches_of_other_shapes_get_their_own_calls(models: Models, ids: Tensor) -> None:
    model = naive.stock(models("gemma3"))
    stream = BlockStream(Checkpoint.open(models("gemma3")), place(True))
    for batch in (ids, ids[:2], ids[:, :9], ids):
        logits = stream.logits(walk(stream, batch), batch)
        assert close(logits, model(input_ids=batch, use_cache=False).logits)


@torch.no_grad()
def test_logits_in_slices(models: Models, ids: Tensor) -> None:
    stream = BlockStream(Checkpoint.open(models("gemma2")), place(True))
    h_BSD = walk(stream, ids)
    whole = stream.nll(h_BSD, ids)
    heads = []
    stream._model.get_submodule("lm_head").register_forward_hook(
        lambda _module, inputs, _output: heads.append(inputs[0].shape[:2])
    )
    stream.place = replace(place(True), logits_bytes=4 * 17 * 101 * 4)
    torch.testing.assert_close(stream.nll(h_BSD, ids), whole)
    assert heads == [(4, 16), (2, 16)]  # sequences, positions that predict
    stream.place = replace(place(True), logits_bytes=1)  # one sequence at least
    torch.testing.assert_close(stream.nll(h_BSD, ids), whole)


def test_batches_cover_all_sequences(models: Models) -> None:
    stream = BlockStream(Checkpoint.open(models("llama")), replace(place(), batch_tokens=22))
    ids = torch.arange(11 * 5).view(11, 5)
    batches = stream.batches(ids)
    assert [len(batch) for batch in batches] == [4, 4, 3]
    assert torch.equal(torch.cat(batches), ids)
    stream.place = replace(place(), batch_tokens=3)
    assert [len(batch) for batch in stream.batches(ids)] == [1] * 11


def test_one_block_is_in_memory_at_a_time(models: Models, ids: Tensor) -> None:
    stream = BlockStream(Checkpoint.open(models("phi3")), place(False))
    for index in (0, 3, 0):
        with stream.block(index) as block:
            live = [not t.is_meta for s in stream.shells for t in s.parameters()]
            assert all(not t.is_meta for t in block.parameters())
            assert sum(live) == len(list(block.parameters()))
        assert on_meta(stream)
    with pytest.raises(RuntimeError, match="stop"), stream.block(1):
        raise RuntimeError("stop")
    assert on_meta(stream)


def test_resident_blocks_are_read_once(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = BlockStream(Checkpoint.open(models("llama")), place(True))
    loaded = []
    read = stream._weights._read
    monkeypatch.setattr(
        stream._weights, "_read", lambda index, device: loaded.append(index) or read(index, device)
    )
    for index in (2, 2, 0, 2):
        with stream.block(index):
            pass
    assert loaded == [2, 0]


def test_weights_are_those_on_disk(models: Models, variant: str) -> None:
    checkpoint = Checkpoint.open(models(variant))
    stream = BlockStream(checkpoint, place(False))
    stored = {name: tensor.clone() for name, tensor in checkpoint.read(checkpoint.files)}
    for index in range(stream.depth):
        with stream.block(index) as block:
            inside = block.state_dict()
            homes = checkpoint.block_homes(index)
            assert set(inside) == {home.parameter for home in homes.values()}
            assert all(
                torch.equal(home.of(inside[home.parameter]), stored[name])
                for name, home in homes.items()
            )


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_the_weight_file_is_let_go_of(models: Models, tmp_path: Path) -> None:
    # A copy: another test's stock model may still hold the shared one's file.
    path = Path(shutil.copytree(models("qwen3"), tmp_path / "model"))
    stream = BlockStream(Checkpoint.open(path), place(False))
    with stream.block(0):
        assert str(path.resolve()) not in Path("/proc/self/maps").read_text()


@torch.no_grad()
def test_half_precision_is_computed_in_float32(models: Models, ids: Tensor, tmp_path: Path) -> None:
    naive.stock(models("llama")).to(torch.bfloat16).save_pretrained(tmp_path)
    stream = BlockStream(Checkpoint.open(tmp_path), place(False))
    logits = stream.logits(walk(stream, ids), ids)
    assert logits.dtype == torch.float32
    assert close(logits, naive.stock(tmp_path)(input_ids=ids, use_cache=False).logits)


@torch.no_grad()
def test_the_longest_sequence_runs_and_a_longer_one_is_refused(
    models: Models, variant: str
) -> None:
    stream = BlockStream(Checkpoint.open(models(variant)), place(True))
    ids = torch.randint(3, 101, (1, 64), generator=torch.Generator().manual_seed(2))
    expected = naive.stock(models(variant))(input_ids=ids, use_cache=False).logits
    assert close(stream.logits(walk(stream, ids), ids), expected)
    with pytest.raises(ShearlingError, match=f"65 tokens .* 64 positions of {variant}.*--length"):
        stream.begin(torch.full((1, 65), 5))


def test_a_foreign_tokenizer_is_refused(models: Models) -> None:
    stream = BlockStream(Checkpoint.open(models("opt")), place(True))
    stream.begin(torch.tensor([[5, 100]]))
    with pytest.raises(ShearlingError, match=r"token 101, but opt knows 0 to 100; .*tokenizer"):
        stream.begin(torch.tensor([[5, 101]]))


@pytest.mark.parametrize(("spare", "resident"), [(-1, False), (1, True)])
def test_residence_goes_by_free_memory(
    models: Models, spare: int, resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(models("llama"))

    class Memory:
        available = 2 * checkpoint.parameters * 4 + spare

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory)
    assert Place.best(checkpoint).streamed is not resident


@torch.no_grad()
def test_blocks_that_were_let_go_of_are_loaded_again(models: Models, ids: Tensor) -> None:
    stream = BlockStream(Checkpoint.open(models("llama")), place(True))
    before = walk(stream, ids)
    assert not on_meta(stream)
    stream.release()
    assert on_meta(stream)
    assert torch.equal(walk(stream, ids), before)
