"""Words that stand for a vocabulary, against the stock model's logits of all of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import naive
import shearling.engine.words
from places import place
from shearling.data.bos import TokenWindows
from shearling.engine.decoding import continue_sequences
from shearling.engine.removals import removal_nll
from shearling.engine.stream import BlockStream
from shearling.engine.walk import backward, logits_of
from shearling.engine.words import Words
from shearling.model.checkpoint import Checkpoint
from shearling.repair.written import PREFIX, write

Models = Callable[[str], Path]
LIKELY, SAMPLED, VOCAB = 30, 40, 101
FAMILIES = ["llama", "llama-tied", "gemma2", "gpt_neox", "opt"]  # gemma2 caps its logits


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of 101 words is large."""
    sizes = {"EXACT": 100, "LIKELY": LIKELY, "MORE": LIKELY + 20, "SAMPLED": SAMPLED}
    for name, size in sizes.items():
        monkeypatch.setattr(shearling.engine.words, name, size)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCAB, (4, 11), generator=torch.Generator().manual_seed(1))


def states(stream: BlockStream, ids_BS: Tensor) -> Tensor:
    h_BSD, calls = stream.begin(ids_BS)
    with torch.no_grad():
        for index in range(stream.depth):
            with stream.block(index) as block:
                h_BSD = calls[index](block, h_BSD)
    return h_BSD


@torch.no_grad()
def stock_logits(path: Path, ids_BS: Tensor) -> Tensor:
    return naive.stock(path)(input_ids=ids_BS, use_cache=False).logits


def naive_counts(words: Words) -> dict[int, float]:
    return dict(zip(words.ids_W.tolist(), words.log_counts_W.exp().tolist(), strict=True))


def test_the_likeliest_and_a_sample_of_the_others() -> None:
    chances_V = torch.rand(VOCAB, generator=torch.Generator().manual_seed(2))
    chances_V[[7, 50]] = torch.inf
    counts = naive_counts(Words.of(chances_V, LIKELY))
    ranked = sorted(range(VOCAB), key=lambda word: -float(chances_V[word]))
    assert all(counts[word] == 1 for word in ranked[:LIKELY])
    rest = ranked[LIKELY:]
    whole = sum(float(chances_V[word]) for word in rest)
    drawn = 0.0
    for word in set(counts) - set(ranked[:LIKELY]):
        chance = (1 / len(rest) + float(chances_V[word]) / whole) / 2
        times = counts[word] * SAMPLED * chance
        assert times == pytest.approx(round(times), abs=1e-3)
        drawn += times
    assert drawn == pytest.approx(SAMPLED, abs=1e-2)
    needed = torch.zeros(VOCAB)
    needed[: LIKELY + 9] = torch.inf
    counts = naive_counts(Words.of(needed, LIKELY))
    assert all(counts[word] == 1 for word in range(LIKELY + 9)), "all that must be there are"
    assert len(counts) > LIKELY + 9, "the others are drawn evenly"
    assert naive_counts(Words.of(chances_V, VOCAB)) == dict.fromkeys(range(VOCAB), 1.0)


def test_the_partition_function_is_right_in_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over draws; and its logarithm is too small by about Var(Z) / 2 Z^2."""
    generator = torch.Generator().manual_seed(3)
    logits_V = torch.randn(VOCAB, generator=generator).double()
    chances_V = logits_V.exp().float() * torch.rand(VOCAB, generator=generator)
    partitions = []
    for seed in range(600):
        monkeypatch.setattr(shearling.engine.words, "SEED", seed)
        words = Words.of(chances_V, LIKELY)
        partitions.append(float((logits_V[words.ids_W] + words.log_counts_W).exp().sum()))
    estimates, whole = torch.tensor(partitions).double(), logits_V.exp().sum()
    error = estimates.std() / len(estimates) ** 0.5
    assert abs(estimates.mean() - whole) < 4 * error
    bias = estimates.log().mean() - whole.log()
    expected = -estimates.var() / (2 * whole**2)
    assert abs(bias - expected) < 4 * error / whole


@pytest.mark.parametrize("variant", FAMILIES)
def test_logits_and_losses_of_these_words(models: Models, variant: str, ids: Tensor) -> None:
    path = models(variant)
    stream = BlockStream(Checkpoint.open(path), place())
    h_BSD, whole_BSV = states(stream, ids), stock_logits(path, ids)
    words = stream.likely_words([(h_BSD, ids)], ids)
    assert words is not None
    counts = naive_counts(words)
    assert all(counts[int(word)] == 1 for word in ids.flatten()), "the text's own are among them"
    probabilities_V = whole_BSV.softmax(-1).sum((0, 1))
    free = [word for word in range(VOCAB) if word not in set(ids.flatten().tolist())]
    free.sort(key=lambda word: -float(probabilities_V[word]))
    ones = {word for word, count in counts.items() if count == 1}
    assert set(free[: max(0, LIKELY - ids.unique().numel())]) <= ones
    expected_BSW = torch.stack(
        [whole_BSV[..., word] + torch.tensor(count).log() for word, count in counts.items()], -1
    )
    with stream.abridged(words), torch.no_grad():
        assert torch.allclose(stream.logits(h_BSD, ids), expected_BSW, atol=2e-5)
        nll_BP = stream.nll(h_BSD, ids)
    for row, tokens in enumerate(ids):
        for at, token in enumerate(tokens[1:].tolist()):
            total = sum(n * float(whole_BSV[row, at, w].double().exp()) for w, n in counts.items())
            loss = torch.tensor(total).log() - whole_BSV[row, at, token]
            assert float(nll_BP[row, at]) == pytest.approx(float(loss), abs=1e-4)
    assert torch.allclose(logits_of(stream, ids), whole_BSV, atol=2e-5), "all words again"


def test_a_small_vocabulary_stands_for_itself(
    models: Models, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shearling.engine.words, "EXACT", VOCAB)
    stream = BlockStream(Checkpoint.open(models("llama")), place())
    assert stream.likely_words([(states(stream, ids), ids)]) is None
    with stream.abridged(None):
        assert stream.words is None


def test_losses_of_removals(models: Models, ids: Tensor) -> None:
    """All over the words that the intact model finds likely; only where that is asked for."""
    stream = BlockStream(Checkpoint.open(models("llama")), place())
    wanted = [frozenset({1}), frozenset[int](), frozenset({2, 3})]
    found = removal_nll(stream, ids, wanted, abridged=True)
    words = stream.likely_words([(states(stream, ids), ids)], ids)
    assert words is not None
    for removed, loss in zip(wanted, found, strict=True):
        left = [block for block in range(5) if block not in removed]
        logits_BSV = logits_of(stream, ids, left)[:, :-1].double()
        counted_BSW = logits_BSV[..., words.ids_W] + words.log_counts_W
        said = logits_BSV.gather(-1, ids[:, 1:, None])[..., 0]
        assert loss == pytest.approx(float((counted_BSW.logsumexp(-1) - said).mean()), abs=1e-4)
    exact = removal_nll(stream, ids, wanted)
    assert exact == pytest.approx(found, abs=1)
    assert all(abs(one - other) > 1e-3 for one, other in zip(exact, found, strict=True))


def gradients(stream: BlockStream, ids_NS: Tensor) -> Tensor:
    """Of a matrix of the first block."""
    for step in backward(stream, ids_NS, "", weights=True):
        step.finish()
        gradient = step.block.get_submodule("mlp.down_proj").get_parameter("weight").grad
        assert gradient is not None
        kept = gradient.clone()
    return kept


def test_gradients(models: Models, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the stock model's loss over these words."""
    path = models("llama")
    stream = BlockStream(Checkpoint.open(path), place())
    words = stream.likely_words([(states(stream, ids), ids)], ids)
    assert words is not None
    model = naive.stock(path)
    logits = model(input_ids=ids, use_cache=False).logits
    losses = [
        (logits[row, at, words.ids_W] + words.log_counts_W).exp().sum().log()
        - logits[row, at, ids[row, at + 1]]
        for row in range(4)
        for at in range(10)
    ]
    torch.stack(losses).mean().backward()
    expected = naive.blocks(model)[0].get_submodule("mlp.down_proj").get_parameter("weight").grad
    assert expected is not None
    found = gradients(stream, ids)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-6)
    monkeypatch.setattr(shearling.engine.words, "EXACT", VOCAB)
    assert not torch.allclose(gradients(stream, ids), found, rtol=1e-3, atol=1e-6)


def test_what_is_drawn(models: Models) -> None:
    """Token by token what the stock model's distribution over these words gives."""
    path = models("llama")
    generator = torch.Generator().manual_seed(4)
    ids_BS = torch.randint(3, VOCAB, (5, 12), generator=generator)
    at_BT = torch.rand(5, 8, generator=generator)
    words = Words.of(torch.rand(VOCAB, generator=generator), LIKELY)
    stream = BlockStream(Checkpoint.open(path), place())
    with torch.no_grad(), stream.abridged(words), stream.whole() as model:
        assert list(continue_sequences(model, ids_BS, at_BT, words)) == list(range(1, 9))
    for row, draws in zip(ids_BS, at_BT, strict=True):
        for step, at in enumerate(draws.tolist()):
            logits_V = stock_logits(path, row[None, : 4 + step])[0, -1].double()
            shares = {w: n * float(logits_V[w].exp()) for w, n in naive_counts(words).items()}
            below = sum(share for word, share in shares.items() if word < row[4 + step])
            total, share = sum(shares.values()), shares[int(row[4 + step])]
            assert below / total - 1e-5 < at < (below + share) / total + 1e-5


def test_what_is_written_without_copies(models: Models) -> None:
    """The words are then asked of the model itself."""
    stream = BlockStream(Checkpoint.open(models("llama")), place())
    windows = torch.randint(3, VOCAB, (3, 17), generator=torch.Generator().manual_seed(5))
    written = write(stream, TokenWindows(windows), 9)
    words = stream.likely_words([(states(stream, windows), windows)], elsewhere=True)
    assert words is not None
    assert LIKELY + 20 < len(words) < VOCAB
    assert set(written[:, PREFIX:].flatten().tolist()) <= set(words.ids_W.tolist())
    assert torch.equal(write(stream, TokenWindows(windows), 9, words=words), written)
