"""A GPU that is too small or too full: what was asked, what is free, and what would fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shearling.engine.card
import shearling.engine.devices
from shearling.engine.card import Card, Demand, gb, require_room
from shearling.engine.devices import own_device
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint

Models = Callable[[str], Path]
CUDA = torch.device("cuda", 0)
WORKING = 5 * 2**29  # a card's margin, and three times the logits that are alive


@pytest.fixture
def checkpoint(models: Models) -> Checkpoint:
    return Checkpoint.open(models("llama"))


def card(free: float, total: float = 80e9, number: int = 0) -> Card:
    return Card(torch.device("cuda", number), "A card", int(total), int(free))


def test_what_a_model_takes(checkpoint: Checkpoint) -> None:
    layers = checkpoint.shape["layers"]
    block = sum(tensor.numel() for name, tensor in checkpoint.read(checkpoint.block_homes(0)))
    outside = checkpoint.parameters - layers * block
    demand = Demand.of(checkpoint, torch.bfloat16)
    assert demand.block == 2 * block
    assert demand.streamed == 4 * outside + WORKING + 12 * block
    assert demand.whole == demand.streamed + 2 * layers * block


def test_a_card_with_room_is_taken(checkpoint: Checkpoint) -> None:
    streamed = Demand.of(checkpoint, torch.float32).streamed
    require_room(checkpoint, torch.float32, card(streamed))
    require_room(checkpoint, torch.float32, card(80e9), streamed)


@pytest.mark.parametrize(
    ("free", "memory", "whole", "others", "says"),
    [
        (2e9, None, False, [], r"2\.0 GB of its 80\.0 GB are free; end what holds the other 78\.0"),
        (2e9, None, False, [card(9e9, number=1)], "--device cuda:1 has 9.0 GB free"),
        (70e9, 10**9, False, [], r"--memory allows 1\.0 GB; give --memory 2\.8GB or more"),
    ],
)
def test_a_card_that_is_full(
    checkpoint: Checkpoint, free: float, memory: int | None, whole: bool, others: list[Card],
    says: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(shearling.engine.card, "has_bfloat16", lambda device: False)
    asked = gb(Demand.of(checkpoint, torch.float32).streamed)
    with pytest.raises(ShearlingError, match=says) as refused:
        require_room(
            checkpoint, torch.float32, card(free), memory, whole=whole, others=lambda: others
        )
    assert f"needs {asked} on cuda:0 (A card) in float32" in str(refused.value)


def test_a_narrower_type_or_a_streamed_model_would_fit(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shearling.engine.card, "has_bfloat16", lambda device: True)
    half, full = (Demand.of(checkpoint, dtype) for dtype in (torch.bfloat16, torch.float32))
    with pytest.raises(ShearlingError, match="--dtype bfloat16 needs"):
        require_room(checkpoint, torch.float32, card(half.streamed), others=list)
    with pytest.raises(ShearlingError, match="leave out --no-stream"):
        require_room(checkpoint, torch.float32, card(full.streamed), whole=True, others=list)


def test_several_processes_take_a_card_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shearling.engine.devices, "num_gpus", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert own_device("auto", 1, 2) == torch.device("cuda", 1)
    assert own_device("cuda", 1, 2) == torch.device("cuda", 1)
    assert own_device("cuda:1", 0, 1) == torch.device("cuda", 1)
    assert own_device("cpu", 5, 6).type == "cpu"
    with pytest.raises(ShearlingError, match="3 processes .* has 2 GPUs"):
        own_device("auto", 2, 3)
    with pytest.raises(ShearlingError, match=r"--device cuda:0 was given to 2 processes"):
        own_device("cuda:0", 0, 2)


def test_a_card_that_does_not_even_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(device: Any) -> Any:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    monkeypatch.setattr(torch.cuda, "mem_get_info", full)
    with pytest.raises(ShearlingError, match="cuda:0 is full"):
        Card.of(CUDA)
