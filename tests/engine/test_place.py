"""Places: chosen by the memory that is free for weights and states, and told to the user."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

import shearling.engine.room
from places import place
from shearling.engine.place import (
    GPU_BATCH_TOKENS,
    LEAST_TOKENS,
    Need,
    Place,
    Wish,
    named_device,
    resident_bytes,
    tokens_in,
)
from shearling.engine.removals import removal_nll
from shearling.engine.room import roomiest
from shearling.engine.states import States
from shearling.engine.stream import BlockStream
from shearling.engine.walk import backward, logits_of
from shearling.errors import ShearlingError
from shearling.files.scratch import SCRATCH
from shearling.model.checkpoint import Checkpoint
from shearling.repair.refit import refit
from shearling.scoring.score_units import score_units
from shearling.table.values import Keep
from tiny_models import LEADING
from tiny_tokenizer import write_llama

Models = Callable[[str], Path]
SINGLES = [frozenset(), *(frozenset({block}) for block in range(5))]


@pytest.fixture
def checkpoint(models: Models) -> Checkpoint:
    return Checkpoint.open(models("llama"))


def tokens(count: int = 8) -> Tensor:
    return torch.randint(101, (count, 17), generator=torch.Generator().manual_seed(0))


def free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    memory = SimpleNamespace(available=count)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


# --- what is chosen ------------------------------------------------------------------------------


def test_a_proof_keeps_to_what_is_allowed(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device has room for the model twice over, but the user allows less."""
    twice = 2 * 4 * checkpoint.parameters
    free(monkeypatch, twice + 1)
    assert Place.cpu().holds(checkpoint, torch.float32)
    assert replace(Place.cpu(), allowed=twice + 1).holds(checkpoint, torch.float32)
    assert not replace(Place.cpu(), allowed=twice).holds(checkpoint, torch.float32)


def test_states_count_as_well_as_weights(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights would fit twice over, but not beside what waits between two blocks."""
    need = Need(tokens=1000, values=100)
    assert need.bytes == 4 * 100_000
    model = resident_bytes(checkpoint, torch.float32)
    free(monkeypatch, 2 * model + 2 * need.bytes + 2)
    assert Place.best(checkpoint, need=need).states == "host"
    free(monkeypatch, 2 * model + 2 * need.bytes - 2)
    chosen = Place.best(checkpoint, need=need)
    assert (chosen.weights, chosen.states) == ("resident", "disk")
    assert chosen.scratch is not None


@pytest.mark.parametrize(("stream", "weights"), [(True, "disk"), (False, "resident")])
def test_the_user_is_followed(
    checkpoint: Checkpoint, stream: bool, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 10**12 if stream else 10)
    assert Place.best(checkpoint, Wish(stream=stream)).weights == weights


def test_it_says_what_it_chose_and_why(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 16 * 10**9)
    (line,) = Place.best(checkpoint, Wish(device="cpu")).lines()
    assert line.startswith("cpu, float32, weights in memory: 16.0 GB of memory are free")
    streamed = Place.best(checkpoint, Wish(device="cpu", stream=True)).lines()
    assert "read block by block" in streamed[0]
    assert "States wait on disk in" in streamed[1]


def test_blocks_count_in_their_own_type(checkpoint: Checkpoint) -> None:
    layout, shape = checkpoint.layout, checkpoint.shape
    blocks = layout.count_block(shape) * shape["layers"]
    outside = checkpoint.parameters - blocks
    assert resident_bytes(checkpoint, torch.float32) == 4 * checkpoint.parameters
    assert resident_bytes(checkpoint, torch.bfloat16) == 2 * blocks + 4 * outside


@pytest.mark.parametrize(
    ("device", "says"),
    [("cuda:99", "cuda:99"), ("tpu", "auto, cpu, cuda or cuda:N"), ("cuda:x", "cuda:x")],
)
def test_a_device_that_is_not_there(device: str, says: str) -> None:
    with pytest.raises(ShearlingError, match=says):
        named_device(device)


def test_an_unknown_type(checkpoint: Checkpoint) -> None:
    with pytest.raises(ShearlingError, match="--dtype int3"):
        Place.best(checkpoint, Wish(device="cpu", dtype="int3"))


def test_the_larger_need_counts() -> None:
    assert Need(10, 3) | Need(7, 5) == Need(7, 5)


# --- where states wait ---------------------------------------------------------------------------


def test_a_file_system_in_memory_is_no_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shearling.engine.room, "file_system", lambda directory: "tmpfs")
    with pytest.raises(ShearlingError, match="none has any"):
        roomiest(1)
    monkeypatch.setenv(SCRATCH, str(tmp_path))  # unless the user says so
    assert roomiest(1).directory == tmp_path


def test_too_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SCRATCH, str(tmp_path))
    with pytest.raises(ShearlingError, match=r"states of 1000000\.0 GB .* lower --samples"):
        roomiest(10**15)


@pytest.mark.parametrize("shelf", ["host", "disk", "device"])
def test_shelves_give_back_what_they_were_given(shelf: Any, tmp_path: Path) -> None:
    with States(replace(place(), states=shelf, scratch=tmp_path)) as states:
        first, second = torch.randn(2, 3, 4).bfloat16(), torch.randn(3, 2, 4).transpose(0, 1)
        states.put("a", 0, first)
        states.put(("a", 1), 1, second)
        assert torch.equal(states.get("a", 0), first)
        states.move("a", "b", 0)
        with pytest.raises(KeyError):
            states.get("a", 0)
        assert torch.equal(states.take("b", 0), first)
        states.drop("b", 0)  # nothing there: nothing happens
        assert torch.equal(states.get(("a", 1), 1), second)
    assert list(tmp_path.iterdir()) == []


def test_no_walk_keeps_states_in_memory_that_wait_on_disk(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and back, gradients included, at most a batch is alive between two passes."""
    held: list[int] = []

    class Watched(States):
        def put(self, key: Any, batch: int, h_BSD: Tensor) -> None:
            super().put(key, batch, h_BSD)
            held.append(sum(isinstance(each, Tensor) for each in self._held.values()))

    monkeypatch.setattr("shearling.engine.walk.States", Watched)
    streamed = replace(place(False), scratch=tmp_path, batch_tokens=34)
    stream = BlockStream(checkpoint, streamed)
    for step in backward(stream, tokens(), "walking", weights=False):
        step.finish()
    assert len(held) > 4 * 5
    assert set(held) == {0}


# --- what is computed ----------------------------------------------------------------------------


def test_states_run_together_give_what_they_give_alone(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = BlockStream(checkpoint, replace(place(), batch_tokens=34))
    alone = removal_nll(stream, tokens(), SINGLES)
    sizes: list[int] = []
    run = stream.run

    def noting(block: Any, call: Any, h_BSD: Tensor) -> Tensor:
        sizes.append(len(h_BSD))
        return run(block, call, h_BSD)

    monkeypatch.setattr(stream, "run", noting)
    monkeypatch.setattr(Place, "merged_tokens", 3 * 34)
    together = removal_nll(stream, tokens(), SINGLES)
    assert max(sizes) == 6
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone))


def narrow(dtype: torch.dtype = torch.bfloat16) -> Place:
    return replace(place(), dtype=dtype)


@pytest.mark.parametrize("variant", LEADING)
def test_blocks_of_a_narrower_type(models: Models, variant: str, tmp_path: Path) -> None:
    """Losses, a repair and the choice of neurons stay near what float32 gives."""
    checkpoint = Checkpoint.open(models(variant))
    whole, half = (BlockStream(checkpoint, each) for each in (place(), narrow()))
    losses = [torch.tensor(removal_nll(stream, tokens(), SINGLES)) for stream in (whole, half)]
    torch.testing.assert_close(losses[1], losses[0], atol=0.03, rtol=0)
    solved = [
        refit(stream, Keep({"layers": (0, 2, 4)}), tokens(), tmp_path).steps
        for stream in (whole, half)
    ]
    for a, b in zip(*solved, strict=True):
        assert b.error_after == pytest.approx(a.error_after, rel=0.25, abs=0.02)
    scores = [
        score_units(stream, "energy", tokens(), ["mlp"])["mlp"].as_json()["scores"]
        for stream in (whole, half)
    ]
    for a, b in zip(*scores, strict=True):
        best = [set(torch.tensor(row).topk(30).indices.tolist()) for row in (a, b)]
        assert len(best[0] & best[1]) >= 28


def test_states_keep_their_digits_between_narrow_blocks(tmp_path: Path) -> None:
    """A stream of float32 through many blocks of bfloat16 is nearer than one of bfloat16."""
    checkpoint = Checkpoint.open(write_llama(tmp_path / "deep", layers=24, dtype=torch.bfloat16))
    ids_BS = tokens(4)
    exact = logits_of(BlockStream(checkpoint, place()), ids_BS)
    kept = logits_of(BlockStream(checkpoint, narrow()), ids_BS)
    rounded = BlockStream(checkpoint, narrow())
    rounded._halves = []  # the block's own sum
    plain = logits_of(rounded, ids_BS)
    assert (kept - exact).norm() < (plain - exact).norm()


def test_fewer_tokens_run_at_a_time_where_little_is_left(checkpoint: Checkpoint) -> None:
    """As many as hold, with what is watched of each, in what a card has left."""
    rooms = (0, 10**6, 10**7, 10**8, 10**12)
    taken = [tokens_in(room, checkpoint, torch.bfloat16) for room in rooms]
    assert taken == sorted(taken)
    assert taken[0] == LEAST_TOKENS
    assert taken[-1] == GPU_BATCH_TOKENS
    one = 16 * checkpoint.shape["mlp"]  # four values of it and their gradients, two bytes each
    for room, tokens in zip(rooms, taken, strict=True):
        assert tokens == LEAST_TOKENS or tokens * one < room
    wider = tokens_in(10**8, checkpoint, torch.float32)
    assert wider <= tokens_in(10**8, checkpoint, torch.bfloat16)
