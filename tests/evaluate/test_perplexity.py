from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import Gemma2Config, Gemma2ForCausalLM

from shearling.errors import ShearlingError
from shearling.evaluate import perplexity as module
from shearling.evaluate.perplexity import Windows, evaluate, mean_nll, perplexity


@pytest.fixture(scope="module")
def gemma():
    """Logits and attention capped, every other layer with a sliding window of 4."""
    torch.manual_seed(0)
    config = Gemma2Config(
        hidden_size=24,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=4,
        intermediate_size=20,
        num_hidden_layers=2,
        vocab_size=300,
        sliding_window=4,
        final_logit_softcapping=2.0,
        initializer_range=0.5,
    )
    return Gemma2ForCausalLM(config).eval()


@torch.no_grad()
def naive(model, windows: torch.Tensor) -> float:
    """Token by token from the full logits, in double precision."""
    total = 0.0
    for row in windows:
        logits = model(row[None]).logits[0].double()
        for i in range(len(row) - 1):
            p = torch.exp(logits[i] - logits[i].max())
            total -= math.log(p[row[i + 1]] / p.sum())
    return total


def windows_of(n: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(300, (n, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("batch", [None, 1, 2, 5, 100])
def test_equals_the_naive_sum(model, batch):
    windows = windows_of(5, 16)
    nll_sum, tokens = mean_nll(model, windows, batch=batch)
    assert tokens == 5 * 15
    assert nll_sum == pytest.approx(naive(model, windows), rel=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_logits_never_exceed_their_limit(gemma, model, monkeypatch, rows):
    """In parts through the KV cache, soft caps and sliding windows included."""
    limit = rows * 300 * 4
    monkeypatch.setattr(module, "LOGITS_BYTES", limit)
    windows = windows_of(3, 12)
    for each in (gemma, model):
        expected, sizes = naive(each, windows), []
        hook = each.register_forward_hook(
            lambda _module, _inputs, output, sizes=sizes: sizes.append(4 * output.logits.numel())
        )
        for batch in (None, 1):
            assert mean_nll(each, windows, batch=batch)[0] == pytest.approx(expected, rel=1e-5)
        hook.remove()
        assert max(sizes) <= limit


def test_progress_ends_at_the_total(model):
    seen = []
    mean_nll(model, windows_of(5, 8), batch=2, progress=lambda *step: seen.append(step[1:]))
    assert seen == [(0, 5), (2, 5), (4, 5), (5, 5)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(shape=st.tuples(st.integers(1, 4), st.integers(2, 9)), batch=st.integers(1, 5))
def test_a_uniform_model_gives_the_vocabulary(model, shape, batch):
    """Where all logits are equal, perplexity is the vocabulary's size, whatever the batch."""
    torch.nn.init.zeros_(model.lm_head.weight)
    nll_sum, tokens = mean_nll(model, torch.zeros(shape, dtype=torch.long), batch=batch)
    assert tokens == shape[0] * (shape[1] - 1)
    assert math.exp(nll_sum / tokens) == pytest.approx(300, rel=1e-6)


def test_bfloat16_sums_in_double(model):
    windows = windows_of(4, 16)
    nll_sum, _ = mean_nll(model.bfloat16(), windows)
    assert nll_sum == pytest.approx(naive(model, windows), rel=1e-3)


def test_refuses_what_gives_no_number(model):
    with pytest.raises(ShearlingError, match="batch is 0"):
        mean_nll(model, windows_of(1, 4), batch=0)
    for windows in (windows_of(0, 4), windows_of(3, 1), torch.zeros(4, dtype=torch.long)):
        with pytest.raises(ShearlingError, match="hold nothing to predict"):
            mean_nll(model, windows)
    torch.nn.init.constant_(model.model.layers[1].mlp.up_proj.weight, float("nan"))
    with pytest.raises(ShearlingError, match="not numbers"):
        mean_nll(model, windows_of(1, 4))


@pytest.mark.parametrize("bos", [False, True])
def test_evaluate_a_directory(model_directory, model, tmp_path, bos):
    text = tmp_path / "some.jsonl"
    texts = ["a first document", "and one more", "the last of them"]
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    result = evaluate(model_directory, text, Windows(tokens=8, most=4, bos=bos))
    assert result.pop("seconds") > 0

    tokens = Tokenizer.from_file(str(model_directory / "tokenizer.json"))
    rows = torch.tensor(tokens.encode("\n\n".join(texts)).ids[:32]).view(4, 8)
    if bos:
        rows = torch.cat([torch.full((4, 1), 256), rows], dim=1)
    nll = naive(model, rows) / (4 * (8 if bos else 7))
    assert result.pop("nll") == pytest.approx(nll, rel=1e-6)
    assert result.pop("perplexity") == pytest.approx(math.exp(nll), rel=1e-5)
    assert result == {
        "kind": "evaluation",
        "text": "some.jsonl",
        "window": 8,
        "windows": 4,
        "bos": bos,
        "tokens": 32 if bos else 28,
    }


def test_refuses_windows_beyond_the_models_positions(model, tokenizer):
    with pytest.raises(ShearlingError, match=r"65 tokens .* 64 positions; .* at most 64"):
        perplexity(model, tokenizer, ["x" * 100], Windows(tokens=65))
    with pytest.raises(ShearlingError, match=r"BOS included.*at most 64"):
        perplexity(model, tokenizer, ["x" * 100], Windows(tokens=65, bos=True))
    # The last token is predicted alone.
    found = perplexity(model, tokenizer, ["x" * 100], Windows(tokens=64, bos=True))
    rows = torch.tensor([[256, *tokenizer("x" * 64)["input_ids"]]])
    assert found["nll"] == pytest.approx(naive(model, rows) / 64, rel=1e-6)


def test_refuses_a_perplexity_beyond_numbers(model, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "mean_nll", lambda *_args, **_options: (8000.0, 10))
    with pytest.raises(ShearlingError, match=r"800 nats.*not a finite number"):
        perplexity(model, tokenizer, ["x" * 100], Windows(tokens=8))


def test_refuses_before_the_model_is_read(tmp_path):
    with pytest.raises(ShearlingError, match="window is 0"):
        evaluate(tmp_path, tmp_path, Windows(tokens=0))
    with pytest.raises(ShearlingError, match="There is no text at"):
        evaluate(tmp_path, tmp_path / "absent.txt")
