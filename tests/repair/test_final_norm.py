"""The final norm's gain: against a long descent in double precision on stock models."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import naive
import shearling.engine.place
import shearling.engine.words
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


@torch.no_grad()
def log_p(source: nn.Module, ids_BS: Tensor) -> Tensor:
    return source(input_ids=ids_BS, use_cache=False).logits.log_softmax(-1)


def divergence(source: nn.Module, model: nn.Module, ids_BS: Tensor) -> Tensor:
    return divergence_from(log_p(source, ids_BS), model, ids_BS)


def divergence_from(wanted: Tensor, model: nn.Module, ids_BS: Tensor) -> Tensor:
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
    gain, unfitted, fitted = found.gain_D, found.before, found.after
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
        assert judged.after < judged.before
        assert torch.equal(judged.gain_D, gain)


def _descend(whole: nn.Module, model: nn.Module, parameter: nn.Parameter, ids: Tensor) -> float:
    model.requires_grad_(False)
    wanted = log_p(whole, ids)
    start = parameter.detach().clone()
    parameter.requires_grad_(True)
    optimiser = torch.optim.LBFGS([parameter], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = divergence_from(wanted, model, ids)
        loss.backward()
        return loss

    optimiser.step(closure)
    with torch.no_grad():
        best = float(divergence_from(wanted, model, ids))
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


def test_as_many_batches_as_are_enough() -> None:
    assert some(range(9), 20, 60) == [0, 3, 6]
    assert some(range(2), 20, 60) == [0, 1]
    assert some([4, 5, 7], 100, 60) == [4]
    assert some([], 20, 60) == []


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of 101 words is large; 70 of them for themselves."""
    for name, size in {"EXACT": 100, "LIKELY": 70, "SAMPLED": 40}.items():
        monkeypatch.setattr(shearling.engine.words, name, size)


@torch.no_grad()
def naive_divergence(
    source: nn.Module, model: nn.Module, ids_BS: Tensor, counts: dict[int, float]
) -> float:
    """Of distributions over some words, each of which counts so many times."""
    total, positions = 0.0, 0
    wanted_BSV, found_BSV = (m(input_ids=ids_BS, use_cache=False).logits for m in (source, model))
    for wanted_V, found_V in zip(wanted_BSV.flatten(0, 1), found_BSV.flatten(0, 1), strict=True):
        p = {word: n * float(wanted_V[word].exp()) for word, n in counts.items()}
        q = {word: n * float(found_V[word].exp()) for word, n in counts.items()}
        p_sum, q_sum = sum(p.values()), sum(q.values())
        total += sum(p[w] / p_sum * math.log(p[w] / p_sum / (q[w] / q_sum)) for w in counts)
        positions += 1
    return total / positions


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("variant", ["llama", "gemma2", "gemma3"])
def test_words_that_stand_for_a_large_vocabulary(
    models: Models, variant: str, tmp_path: Path
) -> None:
    """Their divergence by a naive loop; and the gain serves the whole vocabulary."""
    source, narrow, path = streams(models(variant), tmp_path)
    fit = states(source, narrow, 1)
    ids_BS = fit[0][0]
    words = source.likely_words([(fit[0][1], ids_BS)])
    assert words is not None
    counts = dict(zip(words.ids_W.tolist(), words.log_counts_W.exp().tolist(), strict=True))
    found = fit_gain(source, narrow, fit, fit)
    assert found is not None
    assert found.words == len(words) < 101
    assert narrow.words is source.words is None
    whole, model = naive.stock(models(variant)).double(), naive.stock(path).double()
    assert found.before == pytest.approx(naive_divergence(whole, model, ids_BS, counts), rel=1e-4)
    unfitted = float(divergence(whole, model, ids_BS).detach())
    name = gain_name(narrow)
    assert name is not None
    parameter = model.get_parameter(narrow.checkpoint.family.renamed.get(name, name))
    with torch.no_grad():
        parameter.copy_(found.gain_D)
    assert found.after == pytest.approx(naive_divergence(whole, model, ids_BS, counts), rel=1e-4)
    fitted = float(divergence(whole, model, ids_BS).detach())
    with torch.no_grad():
        parameter.copy_(narrow.outside(name))
    best = _descend(whole, model, parameter, ids_BS)
    assert unfitted - fitted > 0.4 * (unfitted - best)


@pytest.mark.usefixtures("large")
def test_where_all_words_stand_for_themselves(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, narrow, _ = streams(models("llama"), tmp_path)
    fit = states(source, narrow, 1)
    monkeypatch.setattr(shearling.engine.words, "LIKELY", 101)
    some_words = fit_gain(source, narrow, fit, fit)
    monkeypatch.setattr(shearling.engine.words, "EXACT", 101)
    exact = fit_gain(source, narrow, fit, fit)
    assert some_words is not None
    assert exact is not None
    assert some_words.before == exact.before
    assert some_words.after == pytest.approx(exact.after, abs=1e-3)
    assert exact.words is None
