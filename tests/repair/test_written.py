"""What a source model writes itself: from real beginnings, by its own distribution."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import naive
import shearling.repair.written
from places import place
from shearling.data.bos import TokenWindows
from shearling.engine import sampling
from shearling.engine.stream import BlockStream
from shearling.model.checkpoint import Checkpoint
from shearling.repair.written import PREFIX
from tiny_models import LEADING, OF_TWO_WIDTHS

Models = Callable[[str], Path]


def windows(sequences: int = 3, length: int = 17) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, 101, (sequences, length), generator=generator)


def write(stream: BlockStream, ids_NS: Tensor, sequences: int, **options: Any) -> Tensor:
    return shearling.repair.written.write(stream, TokenWindows(ids_NS), sequences, **options)


@pytest.mark.parametrize("variant", ["llama", "gpt_neox", "gemma2", "opt"])
def test_beginnings_are_of_the_text(models: Models, variant: str) -> None:
    ids_NS = windows()
    found = write(BlockStream(Checkpoint.open(models(variant)), place()), ids_NS, 7, seed=1)
    assert found.shape == (7, 17)
    assert found.dtype == ids_NS.dtype
    for number, row in enumerate(found):
        window = ids_NS[number % 3]
        starts = [window[i : i + PREFIX] for i in range(17 - PREFIX + 1)]
        assert any(torch.equal(row[:PREFIX], start) for start in starts)


def test_each_begins_with_bos_if_the_windows_do(models: Models) -> None:
    """And says of it what the stock model says: the draws are those behind BOS and PREFIX."""
    text_NS = windows(3, 16)
    opened = TokenWindows.of(text_NS, 1)
    stream = BlockStream(Checkpoint.open(models("llama")), place())
    found = shearling.repair.written.write(stream, opened, 7, seed=1)
    assert found.shape == (7, 17)
    generator = torch.Generator().manual_seed(1)
    first = torch.randint(16 - PREFIX + 1, (7, 1), generator=generator)
    at_N = torch.rand(7, 16 - PREFIX, generator=generator)[:, 0]
    for number, row in enumerate(found):
        start = text_NS[number % 3][int(first[number]) :][:PREFIX]
        assert row[: PREFIX + 1].tolist() == [1, *start.tolist()]
        with torch.no_grad():
            logits = naive.stock(models("llama"))(input_ids=row[None, : PREFIX + 1]).logits
        sums_V = logits[0, -1].double().softmax(-1).cumsum(-1)
        token = int(row[PREFIX + 1])
        low = float(sums_V[token - 1]) if token else 0.0
        assert low - 1e-5 < float(at_N[number]) < float(sums_V[token]) + 1e-5


@pytest.mark.parametrize("variant", ["llama", "mistral", "gemma3", "gpt_neox", "opt"])
def test_each_token_is_what_the_whole_text_before_it_gives(models: Models, variant: str) -> None:
    """Without a cache, one sequence at a time: no less than a draw that rounding moved."""
    found = write(BlockStream(Checkpoint.open(models(variant)), place()), windows(), 5, seed=3)
    stock = naive.stock(models(variant))
    generator = torch.Generator().manual_seed(3)
    torch.randint(17 - PREFIX + 1, (5, 1), generator=generator)  # where sequences begin
    at_NT = torch.rand(5, 17 - PREFIX, generator=generator)
    for row, at_T in zip(found, at_NT, strict=True):
        for step, at in enumerate(at_T):
            with torch.no_grad():
                logits = stock(input_ids=row[None, : PREFIX + step], use_cache=False).logits
            sums_V = logits[0, -1].double().softmax(-1).cumsum(-1)
            token = int(row[PREFIX + step])
            low = float(sums_V[token - 1]) if token else 0.0
            assert low - 1e-5 < at < float(sums_V[token]) + 1e-5


def test_tokens_are_drawn_from_the_models_distribution(models: Models) -> None:
    """Frequencies of the first token written, against the stock model's probabilities."""
    ids_NS = windows(1, PREFIX + 1)[:, : PREFIX + 1]
    many = write(BlockStream(Checkpoint.open(models("llama")), place()), ids_NS, 4000, seed=2)
    start = many[:1, :PREFIX]
    same = many[(many[:, :PREFIX] == start).all(1)]
    with torch.no_grad():
        logits = naive.stock(models("llama"))(input_ids=start, use_cache=False).logits
    expected = logits[0, -1].double().softmax(-1)
    share = same[:, PREFIX].bincount(minlength=101).double() / len(same)
    assert len(same) > 1500
    # Five standard errors of a frequency, and no token kept out (top_k is 50 by default).
    assert ((share - expected).abs() < 5 * (expected / len(same)).sqrt() + 1e-3).all()
    assert (share > 0).sum() > 60


def test_an_end_of_text_ends_nothing(models: Models) -> None:
    """Every token is an end for once."""
    checkpoint = Checkpoint.open(models("llama"))
    found = write(BlockStream(checkpoint, place()), windows(), 8, seed=1)
    assert found.shape == (8, 17)
    assert (found[:, PREFIX:] == 2).sum() < 8 * 13 / 4, "no padding with the end"


def test_a_seed_says_it_all(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    before = torch.get_rng_state()
    first = write(BlockStream(checkpoint, place()), windows(), 6, seed=3)
    assert torch.equal(torch.get_rng_state(), before), "the caller's draws are left alone"
    assert torch.equal(write(BlockStream(checkpoint, place()), windows(), 6, seed=3), first)
    assert not torch.equal(write(BlockStream(checkpoint, place()), windows(), 6, seed=4), first)
    # Two at a time at most.
    monkeypatch.setattr(sampling, "CACHE_BYTES", 2 * 17 * 4 * 2 * 5 * 3 * 6 + 1)
    assert torch.equal(write(BlockStream(checkpoint, place()), windows(), 6, seed=3), first)
    assert write(BlockStream(checkpoint, place()), windows(), 5, seed=3).shape == (5, 17)


def test_nothing_to_write(models: Models) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    assert write(BlockStream(checkpoint, place()), windows(), 0).shape == (0, 17)
    assert write(BlockStream(checkpoint, place()), windows(3, PREFIX), 5).shape == (0, PREFIX)


def test_what_it_tells(models: Models) -> None:
    told: list[tuple[str, int, int]] = []
    checkpoint = Checkpoint.open(models("llama"))
    write(BlockStream(checkpoint, place()), windows(), 2, progress=lambda *each: told.append(each))
    assert told == [("writing calibration text", n, 13) for n in range(1, 14)]


@pytest.mark.parametrize("variant", [*LEADING, "qwen3_5", "qwen3_5-tied", *OF_TWO_WIDTHS])
def test_blocks_in_bfloat16_write_in_every_family(models: Models, variant: str) -> None:
    """Norms and heads in single precision take what such blocks give, whatever type they ask."""
    narrow = dataclasses.replace(place(), dtype=torch.bfloat16)
    stream = BlockStream(Checkpoint.open(models(variant)), narrow)
    found = write(stream, windows(), 4, seed=1)
    assert found.shape == (4, 17)
    with stream.whole() as model, torch.no_grad():
        logits = model(input_ids=found).logits
    expected = naive.stock(models(variant), torch.bfloat16)(input_ids=found).logits
    exact = naive.stock(models(variant))(input_ids=found).logits
    assert logits.dtype == torch.float32
    assert (logits - exact).norm() < 1.25 * (expected - exact).norm()
