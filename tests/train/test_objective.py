"""Losses and their gradients against whole logits and stock cross-entropy, on every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import naive
import shearling.train.objective
from shearling.data.store import IGNORED
from shearling.model.checkpoint import Checkpoint
from shearling.train.objective import Distillation, Objective, counted, in_chunks

Models = Callable[[str], Path]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty tokens at a time; the last chunk is a part of one."""
    monkeypatch.setattr(shearling.train.objective, "CHUNK", 20)


def batch(sequences: int = 3) -> tuple[Tensor, Tensor]:
    """Tokens, and labels of which the first sequence's first half and some more do not count."""
    ids_BS = torch.randint(3, 101, (sequences, 17), generator=torch.Generator().manual_seed(2))
    labels_BS = ids_BS.clone()
    labels_BS[0, :9] = IGNORED
    labels_BS[-1, 13] = IGNORED
    return ids_BS, labels_BS


def logits(model: Any, ids_BS: Tensor) -> Tensor:
    return model(input_ids=ids_BS, use_cache=False).logits[:, :-1].flatten(0, 1)


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def require_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        # OPT's keys have a bias that moves nothing: its gradient is rounding alone.
        scale = float(gradient.abs().max()) + 1e-3 * largest
        assert float((found[name] - gradient).abs().max()) < 2e-4 * scale, name


def trainable(path: Path) -> Any:
    return naive.stock(path).requires_grad_(True)


def test_text(models: Models, variant: str) -> None:
    model, (ids_BS, labels_BS) = trainable(models(variant)), batch()
    plain = Checkpoint.open(models(variant)).plain_head
    assert plain == (variant not in ("gemma2", "granite", "granitemoehybrid", "cohere2"))
    objective = Objective(model, plain_head=plain)
    found = objective(ids_BS, labels_BS)
    expected = functional.cross_entropy(
        logits(model, ids_BS), labels_BS[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    require_same(gradients(found, model), gradients(expected, model))
    with torch.no_grad():
        assert objective(ids_BS, labels_BS, held_out=True).item() == pytest.approx(
            expected.item(), rel=1e-5
        )


@pytest.mark.parametrize(
    ("temperature", "text_share", "hidden_share"),
    [(1.0, 0.0, 0.0), (2.5, 0.3, 0.0), (1.0, 0.0, 0.7)],
)
@pytest.mark.parametrize("variant", ["llama", "llama-tied", "gemma2", "granite", "gpt_neox", "opt"])
def test_distillation(
    models: Models, variant: str, temperature: float, text_share: float, hidden_share: float
) -> None:
    model, teacher = trainable(models(variant)), naive.stock(models(variant))
    with torch.no_grad():
        draw = torch.Generator().manual_seed(4)
        for parameter in teacher.parameters():
            parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=draw))
    ids_BS, labels_BS = batch()
    objective = Objective(
        model, plain_head=Checkpoint.open(models(variant)).plain_head, teacher=teacher,
        distillation=Distillation(temperature, text_share, hidden_share),
    )  # fmt: skip
    found = objective(ids_BS, labels_BS)
    counting = labels_BS[:, 1:].flatten() != IGNORED
    assert int(counting.sum()) == counted(labels_BS)
    with torch.no_grad():
        wanted = logits(teacher, ids_BS)[counting]
    mine = logits(model, ids_BS)[counting]
    p = (wanted / temperature).softmax(-1)
    expected = (p * (p.log() - (mine / temperature).log_softmax(-1))).sum() * temperature**2
    text = functional.cross_entropy(mine, labels_BS[:, 1:].flatten()[counting], reduction="sum")
    expected = (1 - text_share) * expected + text_share * text
    if hidden_share:
        h, w = (
            getattr(m, m.base_model_prefix)(input_ids=ids_BS).last_hidden_state[:, :-1]
            .flatten(0, 1)[counting]
            for m in (model, teacher)
        )  # fmt: skip
        w = w.detach()
        expected = expected + hidden_share * ((h - w).square().sum(-1) / w.square().sum(-1)).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    require_same(gradients(found, model), gradients(expected, model))
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("bias", [False, True])
def test_chunks_are_the_whole(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients in float64 against cross-entropy over all logits at once."""
    monkeypatch.setattr(shearling.train.objective, "CHUNK", 7)
    draw = torch.Generator().manual_seed(0)
    h, weight = (
        torch.randn(*size, dtype=torch.float64, generator=draw) for size in ((30, 8), (50, 8))
    )
    shift = torch.randn(50, dtype=torch.float64, generator=draw) if bias else None
    labels = torch.randint(50, (30,), generator=draw)
    labels[[3, 12]] = IGNORED

    def whole(h: Tensor, weight: Tensor, shift: Tensor | None, labels: Tensor) -> Tensor:
        logits = functional.linear(h, weight, shift)
        return functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")

    leaves = [None if t is None else t.clone().requires_grad_() for t in (h, weight, shift)]
    others = [None if t is None else t.clone().requires_grad_() for t in (h, weight, shift)]
    (3 * in_chunks(whole, leaves[0], leaves[1], leaves[2], labels)).backward()
    (3 * whole(others[0], others[1], others[2], labels)).backward()
    for leaf, other in zip(leaves, others, strict=True):
        if leaf is not None and other is not None:
            torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_heads_gradients_add_up_in_float32_under_autocast() -> None:
    """What the bare product and cross-entropy under autocast give, whatever the chunks."""
    draw = torch.Generator().manual_seed(0)
    h, weight = torch.randn(600, 8, generator=draw), torch.randn(50, 8, generator=draw)
    labels = torch.randint(50, (600,), generator=draw)
    head = nn.Linear(8, 50, bias=False)
    found, losses = [], []
    for ours in (True, False):
        leaf = h.clone().requires_grad_()
        head.weight = nn.Parameter(weight.clone())
        with torch.autocast("cpu", torch.bfloat16):
            if ours:
                loss = in_chunks(
                    shearling.train.objective._chunk_nll, leaf, head.weight, None, labels
                )
            else:
                loss = functional.cross_entropy(head(leaf).float(), labels, reduction="sum")
        loss.backward()
        assert leaf.grad is not None
        assert head.weight.grad is not None
        assert leaf.grad.dtype == head.weight.grad.dtype == torch.float32
        losses.append(loss.item())
        found.append((leaf.grad, head.weight.grad))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=0.1)


def test_held_out_text_is_not_judged_by_a_teacher(models: Models) -> None:
    model = naive.stock(models("llama"))
    ids_BS, labels_BS = batch()
    alone = Objective(model, plain_head=True)
    taught = Objective(model, plain_head=True, teacher=naive.stock(models("llama")))
    with torch.no_grad():
        assert torch.equal(
            taught(ids_BS, labels_BS, held_out=True), alone(ids_BS, labels_BS, held_out=True)
        )
        assert taught(ids_BS, labels_BS).abs() < 1e-4  # it is its own teacher


@pytest.mark.parametrize("variant", ["llama", "gemma3", "gpt_neox", "opt"])
def test_states_that_enter_blocks_are_compared(models: Models, variant: str) -> None:
    """Against hooks on the blocks, for a model that lacks two blocks of its teacher's."""
    source, blocks = Checkpoint.open(models(variant)), (0, 3, 4)
    model, teacher = trainable(models(variant)), naive.stock(models(variant))
    parent, _, leaf = source.family.blocks.rpartition(".")
    both = [list(m.get_submodule(source.family.blocks)) for m in (model, teacher)]
    setattr(model.get_submodule(parent), leaf, nn.ModuleList([both[0][i] for i in blocks]))
    seen: list[dict[int, Tensor]] = [{}, {}]
    for own, found, numbers in zip(both, seen, (blocks, range(5)), strict=True):
        for i in numbers:
            own[i].register_forward_pre_hook(
                lambda _, args, found=found, i=i: found.__setitem__(i, args[0])
            )
    ids_BS, labels_BS = batch()
    plain = source.plain_head
    with torch.no_grad():
        alone, matched = (
            Objective(
                model,
                plain_head=plain,
                teacher=teacher,
                distillation=Distillation(hidden_share=share, stands_for=blocks),
            )(ids_BS, labels_BS)
            for share in (0.0, 0.5)
        )
        h, w = (
            getattr(m, m.base_model_prefix)(input_ids=ids_BS).last_hidden_state
            for m in (model, teacher)
        )
    counting = labels_BS[:, 1:] != IGNORED
    pairs = [(seen[0][i], seen[1][i]) for i in blocks[1:]] + [(h, w)]
    errors = [
        ((a - b).square().sum(-1) / b.square().sum(-1))[:, :-1][counting].sum() for a, b in pairs
    ]
    expected = 0.5 * torch.stack(errors).mean()
    assert (matched - alone).item() == pytest.approx(expected.item(), rel=1e-3)
