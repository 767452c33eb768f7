"""The final norm's gain: against a long descent in double precision on stock models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import naive
import shearling.engine.place
from places import place
from shearling.engine.stream import BlockStream
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.cut import cut
from shearling.repair.final_norm import Triple, fit_gain, gain_name, some
from shearling.table.values import Keep

Models = Callable[[str], Path]

DEPTH = Keep({"layers": (0, 2, 4)})
FAMILIES = ["llama", "llama-tied", "gemma2", "gemma3", "gpt_neox", "opt", "phi3"]


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of three sequences at a time, the last slice of one."""
    monkeypatch.setattr(shearling.engine.place, "LOGITS_BYTES", 3 * 4 * 17 * 101)


def drawn(sequences: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 101, (sequences, 17), generator=generator)


@torch.inference_mode()
def last(stream: BlockStream, ids_BS: Tensor) -> Tensor:
    h_BSD, calls = stream.begin(ids_BS)
    for index in range(stream.depth):
        with stream.block(index) as block:
            h_BSD = calls[index](block, h_BSD)
    return h_BSD


def states(source: BlockStream, cut_stream: BlockStream, seed: int) -> list[Triple]:
    ids_BS = drawn(4, seed)
    return [(ids_BS, last(source, ids_BS), last(cut_stream, ids_BS))]


def streams(path: Path, directory: Path) -> tuple[BlockStream, BlockStream, Path]:
    checkpoint = Checkpoint.open(path)
    result = cut(checkpoint, DEPTH, directory / "cut")
    source, narrow = (BlockStream(each, place(True)) for each in (checkpoint, result))
    return source, narrow, result.path


def divergence(source: nn.Module, model: nn.Module, ids_BS: Tensor) -> Tensor:
    with torch.no_grad():
        wanted = source(input_ids=ids_BS, use_cache=False).logits.log_softmax(-1)
    found = model(input_ids=ids_BS, use_cache=False).logits.log_softmax(-1)
    return (wanted.exp() * (wanted - found)).sum(-1).mean()


@pytest.mark.parametrize("variant", FAMILIES)
def test_against_a_long_descent(models: Models, variant: str, tmp_path: Path) -> None:
    source, narrow, path = streams(models(variant), tmp_path)
    name = gain_name(narrow)
    assert name is not None
    fit, held = states(source, narrow, 1), states(source, narrow, 2)
    before = narrow.outside(name).clone()
    # Judged by what it was fitted on, so that it is taken whatever the noise.
    found = fit_gain(source, narrow, fit, fit)
    assert found is not None
    gain, unfitted, fitted = found
    assert torch.equal(narrow.outside(name), before), "the model is left as it was"
    whole, model = naive.stock(models(variant)).double(), naive.stock(path).double()
    parameter = model.get_parameter(narrow.checkpoint.family.renamed.get(name, name))
    ids_BS = fit[0][0]
    assert unfitted == pytest.approx(divergence(whole, model, ids_BS).item(), rel=1e-4)
    best = _descend(whole, model, parameter, ids_BS)
    with torch.no_grad():
        parameter.copy_(gain)
    assert fitted == pytest.approx(divergence(whole, model, ids_BS).item(), rel=1e-4)
    assert unfitted - fitted > 0.6 * (unfitted - best)
    judged = fit_gain(source, narrow, fit, held)
    if judged is not None:
        assert judged[2] < judged[1]
        assert torch.equal(judged[0], gain)


def _descend(whole: nn.Module, model: nn.Module, parameter: nn.Parameter, ids: Tensor) -> float:
    model.requires_grad_(False)
    start = parameter.detach().clone()
    parameter.requires_grad_(True)
    optimiser = torch.optim.LBFGS([parameter], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = divergence(whole, model, ids)
        loss.backward()
        return loss

    optimiser.step(closure)
    with torch.no_grad():
        best = float(divergence(whole, model, ids))
        parameter.copy_(start)
    parameter.requires_grad_(False)
    return best


def test_held_out_text_may_refuse_it(models: Models, tmp_path: Path) -> None:
    """A gain fitted where the cut errs much does harm where it hardly errs."""
    source, narrow, _ = streams(models("llama"), tmp_path)
    fit = states(source, narrow, 1)
    ids_BS = drawn(4, 2)
    h_BSD = last(source, ids_BS)
    near = h_BSD + 0.01 * torch.randn(h_BSD.shape, generator=torch.Generator().manual_seed(3))
    assert fit_gain(source, narrow, fit, fit) is not None
    assert fit_gain(source, narrow, fit, [(ids_BS, h_BSD, near)]) is None


def test_a_model_without_a_final_norm(models: Models, tmp_path: Path) -> None:
    source, narrow, _ = streams(models("opt-projected"), tmp_path)
    assert gain_name(narrow) is None
    fit = states(source, narrow, 1)
    assert fit_gain(source, narrow, fit, fit) is None


def test_as_many_batches_as_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shearling.repair.final_norm, "TOKENS", 60)
    assert some(range(9), 20) == [0, 3, 6]
    assert some(range(2), 20) == [0, 1]
    assert some([4, 5, 7], 100) == [4]
    assert some([], 20) == []
