"""Rewritten calibration text: against the stock model's own distribution."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import naive
import shearling.engine.place
from places import place
from shearling.engine.stream import BlockStream
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.repair.rewritten import SHARES, augment

Models = Callable[[str], Path]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four sequences of 17 tokens in a batch, the last of two; logits of three at a time."""
    monkeypatch.setattr(shearling.engine.place, "BATCH_TOKENS", 4 * 17)
    monkeypatch.setattr(shearling.engine.place, "LOGITS_BYTES", 3 * 4 * 17 * 101)


def opened(path: Path, *, resident: bool = True) -> BlockStream:
    return BlockStream(Checkpoint.open(path), place(resident))


@torch.no_grad()
def following(path: Path, ids_NS: Tensor) -> Tensor:
    """What the stock model thinks comes after each token but the last (N, S-1, V), in double."""
    logits = naive.stock(path)(input_ids=ids_NS, use_cache=False).logits
    return logits[:, :-1].double().softmax(-1)


@pytest.mark.parametrize("variant", ["llama", "gpt_neox", "gemma2", "opt-projected"])
def test_every_token_rewritten_is_the_models_own(
    models: Models, variant: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All draws at one place of the distribution: its median, whatever the model."""
    real = torch.rand

    def median(*size: Any, **options: Any) -> Tensor:
        return torch.full_like(real(*size, **options), 0.5)

    monkeypatch.setattr(torch, "rand", median)
    found = augment(opened(models(variant)), ids, shares=(0.4, 0.6))
    before = following(models(variant), ids).cumsum(-1)
    said = (before > 0.5).int().argmax(-1)
    near = (before - 0.5).abs().min(-1).values < 1e-5  # where rounding may decide
    assert near.double().mean() < 0.05
    assert torch.equal(found[:6], ids)
    assert torch.equal(found[6:12], ids)  # 0.5 is not below 0.4: nothing is chosen
    rewritten = found[12:]
    assert torch.equal(rewritten[:, 0], ids[:, 0])
    assert torch.equal(rewritten[:, 1:][~near], said[~near])
    assert not torch.equal(rewritten, ids)


def test_draws_follow_the_distribution(models: Models, ids: Tensor) -> None:
    """Every token drawn anew, 1,500 times over: as often as its probability says."""
    one = ids[:1]
    path = models("llama")
    copies = augment(opened(path), one.repeat(1500, 1), shares=(1.0,))[1500:]
    expected = following(path, one)[0]
    found = torch.stack(
        [torch.bincount(column, minlength=101) for column in copies[:, 1:].T]
    ).double()
    assert torch.equal(copies[:, 0], one[0, 0].expand(1500))
    # Pearson's statistic over tokens expected often enough: mean 1 a cell, if the draws are fair.
    often = expected * 1500 > 5
    cells = ((found - expected * 1500).square() / (expected * 1500))[often]
    assert len(cells) > 50
    assert float(cells.mean()) == pytest.approx(1, abs=4 * (2 / len(cells)) ** 0.5)
    uniform = ((found - 1500 / 101).square() / (1500 / 101)).mean()
    assert float(uniform) > 10  # so that the test can tell


def test_order_of_copies_and_shares(models: Models) -> None:
    ids_NS = torch.randint(3, 101, (200, 17), generator=torch.Generator().manual_seed(5))
    found = augment(opened(models("llama")), ids_NS, shares=(0.2, 0.9, 0.5))
    assert (found.shape, found.dtype) == ((800, 17), ids_NS.dtype)
    assert int(found.min()) >= 0
    assert int(found.max()) < 101
    copies = found.view(4, 200, 17)
    assert torch.equal(copies[0], ids_NS)
    assert all(torch.equal(copy[:, 0], ids_NS[:, 0]) for copy in copies)
    # Some tokens are drawn as they were, hence a little less.
    same = following(models("llama"), ids_NS).gather(-1, ids_NS[:, 1:, None]).mean()
    for copy, share in zip(copies[1:], (0.2, 0.9, 0.5), strict=True):
        changed = (copy != ids_NS)[:, 1:].double()
        assert float(changed.mean()) == pytest.approx(share * (1 - float(same)), abs=0.03)
        # Copy c of sequence n is in the row of n, and everywhere in it.
        assert float(changed.mean(1).max()) < share + 0.5
        assert float(changed.mean(0).min()) > share - 0.15
    chosen = [(copy != ids_NS).double().flatten() for copy in copies[1:]]
    assert abs(float(torch.corrcoef(torch.stack(chosen))[0, 1])) < 0.2  # drawn apart


@pytest.mark.parametrize("variant", ["llama", "gemma3", "phi3"])
def test_streamed_is_resident_and_seeded(models: Models, variant: str, ids: Tensor) -> None:
    found = [
        augment(opened(models(variant), resident=resident), ids, seed=seed)
        for resident, seed in ((True, 0), (False, 0), (True, 1))
    ]
    assert found[0].shape == (6 * (1 + len(SHARES)), 17)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    state = torch.random.get_rng_state()
    assert torch.equal(augment(opened(models(variant)), ids), found[0])
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's chance is used


def test_nothing_to_rewrite(models: Models, ids: Tensor) -> None:
    stream = opened(models("llama"))
    assert torch.equal(augment(stream, ids, shares=()), ids)
    assert torch.equal(augment(stream, ids[:, :1]), ids[:, :1].repeat(2, 1))


def test_what_it_tells(models: Models, ids: Tensor) -> None:
    told: list[tuple[str, int, int]] = []
    augment(opened(models("llama")), ids, progress=lambda *each: told.append(each))
    assert told == [("rewriting calibration text", done, 5) for done in range(1, 6)]


@pytest.mark.parametrize("share", [0, -0.5, 1.01, float("nan")])
def test_shares_that_are_none(models: Models, ids: Tensor, share: float) -> None:
    with pytest.raises(ShearlingError, match=r"\[0.5, .*\] were given, but each must lie between"):
        augment(opened(models("llama")), ids, shares=(0.5, share))


def test_what_cannot_be_said_is_not(
    models: Models, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draws at the very ends of the distribution, where the tokens there have no probability."""
    logits = torch.zeros(101)
    logits[:3] = logits[90:] = -1e9
    monkeypatch.setattr(
        BlockStream, "logits", lambda self, h_BSD, ids_BS: logits.expand(*ids_BS.shape, 101)
    )
    real = torch.rand
    for end, expected in ((0.0, 3), (1 - 2**-24, 89)):
        with monkeypatch.context() as patch:
            patch.setattr(
                torch, "rand", lambda *size, end=end, **_: torch.full_like(real(*size), end)
            )
            found = augment(opened(models("llama")), ids, shares=(1.0,))[6:, 1:]
        assert set(found.flatten().tolist()) == {expected}
