"""What a cut is said to take of memory, counted again from the tensors themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from places import place
from shearling.engine.card import MARGIN, Card
from shearling.engine.peak import PROVING, REPAIRING, SCORING, Peak, shortage, stages_of
from shearling.engine.place import Need, Place, Wish, on_card
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.table.values import Shape

Models = Callable[[str], Path]
NEED = Need(40, 7 * 36 + 54)


def stages(checkpoint: Checkpoint, where: Place, after: Shape) -> dict[str, Peak]:
    return {p.stage: p for p in stages_of(checkpoint, where, NEED, after, scored=20)}


def numbers(checkpoint: Checkpoint) -> tuple[int, int]:
    """Of what is outside the blocks, and of a block, by the tensors on disk."""
    tensors = {name: t.numel() for name, t in checkpoint.read(checkpoint.dtypes)}
    inside = [count for name, count in tensors.items() if ".layers.0." in name]
    return sum(n for name, n in tensors.items() if ".layers." not in name), sum(inside)


def test_block_by_block_on_a_processor(models: Models) -> None:
    checkpoint = Checkpoint.open(models("qwen3_moe"))
    after = checkpoint.shape.with_(experts=3)
    outside, block = numbers(checkpoint)
    left = block - 2 * (3 * 20 * 36 + 36)  # without two experts, and their rows of the router
    by_stage = stages(checkpoint, place(False), after)
    scoring, repairing, proving = (by_stage[s] for s in (SCORING, REPAIRING, PROVING))
    assert (scoring.outside, proving.outside) == (4 * outside, 8 * outside)
    assert (scoring.blocks, repairing.blocks, proving.blocks) == (4 * block, 4 * left, 4 * block)
    assert all((p.states, p.margin) == (0, 0) for p in by_stage.values())
    # o_proj's system, in double precision, of 54 inputs and 36 outputs; the batch's inputs.
    system = 8 * (3 * 55**2 + 6 * 55 * 36) + 4 * 40 * (2 * 54 + 4 * 36)
    assert repairing.computing == system
    assert repairing.total == 4 * outside + 4 * left + system
    # A token's activations, and what all five experts give for the 20 that are scored.
    assert scoring.computing == max(
        20 * 4 * (8 * 36 + 4 * 54 + 4 * 2 * 20) + 4 * 20 * 5 * 36, 3 * 4 * 40 * 101,
        40 * 4 * (8 * 36 + 4 * 54 + 4 * 2 * 20),
    )  # fmt: skip
    told = Peak.of(checkpoint, place(False), NEED, after, scored=20, repaired=True)
    assert told == max(by_stage.values(), key=lambda p: p.total)
    assert told.as_json()["peak_bytes"] == told.total
    alone = Peak.of(checkpoint, place(False), NEED, after, scored=20, repaired=False)
    assert alone.stage != REPAIRING


def test_in_memory_all_blocks_count(models: Models) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    outside, block = numbers(checkpoint)
    by_stage = stages(checkpoint, place(), checkpoint.shape.with_(mlp=40))
    left = block - 3 * 10 * 36
    assert by_stage[SCORING].blocks == 4 * 5 * block
    assert by_stage[REPAIRING].blocks == 4 * (5 * block + left)
    assert by_stage[REPAIRING].states == NEED.bytes
    narrower = stages(checkpoint, place(), checkpoint.shape.with_(hidden=30))[REPAIRING]
    assert narrower.outside == 4 * outside + 4 * outside * 30 // 36  # the cut has one of its own


def test_on_a_card_that_is_not_there(models: Models) -> None:
    """The place that it would be, and what it would take, with none to ask."""
    checkpoint = Checkpoint.open(models("qwen3_moe"))
    _, block = numbers(checkpoint)
    card = Card(torch.device("cuda", 0), "A card", 24 * 10**9, 24 * 10**9)
    where = on_card(checkpoint, card, torch.bfloat16, Wish(stream=True), NEED)
    assert (where.weights, where.states) == ("disk", "device")
    by_stage = stages(checkpoint, where, checkpoint.shape.with_(experts=3))
    left = block - 2 * (3 * 20 * 36 + 36)
    # Two blocks of the cut and one of the source that is on its way; in the proof two in float32.
    assert by_stage[REPAIRING].blocks == 2 * (block + 2 * left)
    assert by_stage[SCORING].blocks == 2 * 2 * block
    assert by_stage[PROVING].blocks == 4 * 2 * block
    # Gates of all experts, beside them one by one while they are joined.
    assert by_stage[SCORING].joining == 2 * 5 * 2 * 20 * 36
    assert all(p.margin == MARGIN for p in by_stage.values())
    assert by_stage[REPAIRING].states == NEED.bytes
    assert "needs about 1.1 GB of it while" in by_stage[REPAIRING].line()
    small = Card(torch.device("cuda", 0), "A card", 10**9, 10**9)
    with pytest.raises(ShearlingError, match=r"even with one block there at a time, but 1\.0 GB"):
        on_card(checkpoint, small, torch.bfloat16, Wish(), NEED)


def test_a_card_that_a_cut_would_fill_is_told_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what has less on it, by where blocks and states wait now."""
    free = {"cuda:0": 20 * 10**9, "cpu": 20 * 10**9}
    monkeypatch.setattr("shearling.engine.peak.free_bytes", free.get)
    fitting, large = Peak(PROVING, 10**9, 19 * 10**9), Peak(PROVING, 10**9, 20 * 10**9)
    card = Place(torch.device("cuda", 0), torch.bfloat16)
    assert shortage(fitting, card) is None
    assert shortage(fitting, replace(card, allowed=19 * 10**9)) is not None
    said = shortage(large, card)
    assert said is not None
    assert "takes about 21.0 GB while proving the cut, but 20.0 GB of cuda:0 are free" in said
    assert "give --memory 16GB, with which blocks wait in pinned memory" in said
    pinned = shortage(large, replace(card, weights="pinned", states="device"))
    assert pinned is not None
    assert "give --memory 12GB, with which states wait on the host" in pinned
    least = shortage(large, replace(card, weights="pinned", states="host"))
    assert least is not None
    assert "fewer --samples" in least
    processor = shortage(large, Place.cpu())
    assert processor is not None
    assert "give --stream" in processor


def test_a_proof_on_a_card_has_the_place_of_the_blocks(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shearling.engine.place.free_bytes", lambda device: 10**6)
    checkpoint = Checkpoint.open(models("llama"))
    _, block = numbers(checkpoint)
    card = Card(torch.device("cuda", 0), "A card", 24 * 10**9, 24 * 10**9)
    where = on_card(checkpoint, card, torch.bfloat16, Wish(stream=False), NEED)
    assert where.weights == "resident"
    after = checkpoint.shape.with_(mlp=40)
    whole = 4 * (checkpoint.layout.count(after) - block) if where.room_for(
        checkpoint.layout.count(after), torch.float32
    ) else 0  # fmt: skip
    assert stages(checkpoint, where, after)[PROVING].blocks == 4 * 2 * block + whole
    assert stages(checkpoint, place(), after)[PROVING].blocks > 4 * 5 * block
