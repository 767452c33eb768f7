"""Token by token, with keys and values in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicSlidingWindowLayer

import naive
from shearling.engine import decoding
from shearling.engine.decoding import continue_sequences

Models = Callable[[str], Path]


def beginnings(rows: int = 3, length: int = 19) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of which the first four are given, and draws."""
    generator = torch.Generator().manual_seed(2)
    ids_BS = torch.randint(3, 101, (rows, length), generator=generator)
    return ids_BS, torch.rand(rows, length - 4, generator=generator)


@pytest.mark.parametrize("variant", ["llama", "qwen2", "gemma2", "gemma3", "gpt_neox", "mistral"])
@torch.no_grad()
def test_steps_that_can_be_recorded_change_nothing(
    models: Models, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several recordings, the last one short."""
    monkeypatch.setattr(decoding, "SEGMENT", 4)
    stock = naive.stock(models(variant))
    fixed = decoding._fixed_rooms(stock, 19)
    if fixed is None:
        assert stock.config.sliding_window < 19
        return
    ids_BS, at_BT = beginnings()
    other_BS, cache = ids_BS.clone(), Cache(layers=list(fixed))
    list(continue_sequences(stock, ids_BS, at_BT))
    list(decoding._stepwise(stock, other_BS[:, :6], at_BT[:, :2], cache))
    step = decoding._Step(stock, other_BS, at_BT, cache, 2)
    assert list(decoding._in_segments(step, fixed, recorded=False)) == list(range(3, 16))
    assert torch.equal(other_BS, ids_BS)


@pytest.mark.parametrize(("variant", "window"), [("mistral", 19), ("gemma3", 19), ("gemma3", 18)])
@torch.no_grad()
def test_a_window_that_nothing_leaves_is_room_like_any(
    models: Models, variant: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers' own cache, which copies all keys at every token."""
    stock = naive.stock(models(variant))
    stock.config.sliding_window = window
    ids_BS, at_BT = beginnings()
    other_BS = ids_BS.clone()
    list(continue_sequences(stock, ids_BS, at_BT))
    kinds = [type(layer) for layer in decoding._growing(stock, 19).layers]
    assert (DynamicSlidingWindowLayer in kinds) == (window < 19)
    list(decoding._stepwise(stock, other_BS, at_BT, DynamicCache(config=stock.config)))
    assert torch.equal(other_BS, ids_BS)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["llama", "qwen2", "gpt_neox"])
@torch.no_grad()
def test_a_recorded_step_is_the_step(
    models: Models, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "SEGMENT", 5)
    stock = naive.stock(models(variant)).cuda()
    ids_BS, at_BT = (tensor.cuda() for tensor in beginnings())
    other_BS = ids_BS.clone()
    assert list(continue_sequences(stock, ids_BS, at_BT)) == list(range(1, 16))
    list(decoding._stepwise(stock, other_BS, at_BT, decoding._growing(stock, 19)))
    assert torch.equal(ids_BS, other_BS)
