from __future__ import annotations

import warnings

import pytest
import torch

from shearling.errors import ShearlingError
from shearling.evaluate.generation import Sampling, choose_token, generate


@torch.no_grad()
def naive_greedy(model, tokenizer, prompt: str, new: int) -> str:
    """The whole text through the model for every token, no cache."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < start + new:
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return tokenizer.decode(ids, skip_special_tokens=True)[len(prompt) :]


@pytest.fixture
def ascii_model(model):
    """Only tokens that are characters on their own can win, so that text can be compared."""
    keep = torch.zeros(300, dtype=torch.bool)
    keep[:94] = True  # the printable ASCII bytes come first in the byte-level alphabet
    keep[257] = True
    model.lm_head.weight.data[~keep] = 0
    return model


def test_greedy_equals_a_loop_without_cache(ascii_model, tokenizer):
    prompts = ["Once upon a time", "x", "a longer prompt, of some words"]
    samples = generate(ascii_model, tokenizer, prompts, Sampling(max_new_tokens=20))
    assert [s["prompt"] for s in samples] == prompts
    assert [s["text"] for s in samples] == [
        naive_greedy(ascii_model, tokenizer, prompt, 20) for prompt in prompts
    ]
    assert all(s["text"] for s in samples)


def test_greedy_equals_transformers(ascii_model, tokenizer):
    prompt = "Once upon a time"
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    theirs = ascii_model.generate(ids, do_sample=False, max_new_tokens=16, pad_token_id=257)
    [ours] = generate(ascii_model, tokenizer, [prompt], Sampling(max_new_tokens=16))
    assert prompt + ours["text"] == tokenizer.decode(theirs[0], skip_special_tokens=True)


def test_the_checkpoints_sampling_defaults_are_ignored_silently(ascii_model, tokenizer, caplog):
    expected = generate(ascii_model, tokenizer, ["abc"], Sampling(max_new_tokens=12))
    settings = ascii_model.generation_config
    settings.do_sample, settings.temperature, settings.top_p = True, 1.7, 0.4
    settings.repetition_penalty = 5.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(ascii_model, tokenizer, ["abc"], Sampling(max_new_tokens=12)) == expected
    assert not caplog.records


@pytest.mark.parametrize("where", ["tokenizer", "settings"])
def test_stops_at_an_end_token(ascii_model, tokenizer, where):
    free = generate(ascii_model, tokenizer, ["abc"], Sampling(max_new_tokens=8))[0]["text"]
    first = tokenizer(free[0])["input_ids"][0]
    if where == "settings":
        ascii_model.generation_config.eos_token_id = [first]
    else:
        ascii_model.lm_head.weight.data[257] = 2 * ascii_model.lm_head.weight.data[first]
    assert generate(ascii_model, tokenizer, ["abc"], Sampling(max_new_tokens=8))[0]["text"] == ""


def test_samples_are_a_function_of_prompt_and_seed(ascii_model, tokenizer):
    options = {"max_new_tokens": 24, "temperature": 1.5}
    one, two = generate(ascii_model, tokenizer, ["abc", "def"], Sampling(seed=1, **options))
    assert generate(ascii_model, tokenizer, ["def"], Sampling(seed=1, **options)) == [two]
    assert generate(ascii_model, tokenizer, ["abc"], Sampling(seed=2, **options)) != [one]


def test_a_vanishing_temperature_or_nucleus_is_greedy(ascii_model, tokenizer):
    greedy = generate(ascii_model, tokenizer, ["abc"], Sampling(max_new_tokens=12))
    for options in ({"temperature": 1e-12}, {"temperature": 1.0, "top_p": 1e-12}):
        assert (
            generate(ascii_model, tokenizer, ["abc"], Sampling(max_new_tokens=12, **options))
            == greedy
        )


@pytest.mark.parametrize(("top_p", "support"), [(0.5, {2}), (0.51, {2, 0}), (0.81, {2, 0, 3})])
def test_nucleus_holds_the_likeliest_that_reach_top_p(top_p, support):
    logits = torch.tensor([0.3, 0.05, 0.5, 0.15]).log()
    generator = torch.Generator().manual_seed(0)
    assert {choose_token(logits, 1.0, top_p, generator) for _ in range(200)} == support


def test_sampling_follows_the_probabilities():
    probabilities = torch.tensor([0.3, 0.05, 0.5, 0.15])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor(
        [choose_token(probabilities.log(), 1.0, 1.0, generator) for _ in range(4000)]
    )
    assert torch.allclose(drawn.bincount() / 4000, probabilities, atol=0.03)
    hot = torch.tensor(
        [choose_token(probabilities.log(), 2.0, 1.0, generator) for _ in range(4000)]
    )
    expected = probabilities.sqrt() / probabilities.sqrt().sum()
    assert torch.allclose(hot.bincount() / 4000, expected, atol=0.03)


def test_an_empty_prompt_starts_from_bos(ascii_model, tokenizer):
    [sample] = generate(ascii_model, tokenizer, [""], Sampling(max_new_tokens=5))
    assert sample["prompt"] == ""
    assert len(sample["text"]) == 5


class WithoutBos:
    bos_token_id = eos_token_id = None

    def __call__(self, *_: object, **__: object) -> dict[str, list[int]]:
        return {"input_ids": []}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, r"temperature is -1\.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, r"top_p is 0\.0"),
        ({"top_p": 1.1}, r"top_p is 1\.1"),
        ({"max_new_tokens": 63}, "3 tokens and 63 new ones are longer than the model's 64"),
    ],
)
def test_refuses_a_setting(model, tokenizer, options, message):
    with pytest.raises(ShearlingError, match=message):
        generate(model, tokenizer, ["abc"], Sampling(**options))


def test_refuses_a_prompt_without_tokens(model):
    with pytest.raises(ShearlingError, match=r"The prompt .. has no tokens"):
        generate(model, WithoutBos(), [""])  # ty: ignore


def test_refuses_logits_that_are_not_numbers(model, tokenizer):
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ShearlingError, match="not numbers"):
        generate(model, tokenizer, ["abc"], Sampling(max_new_tokens=4))
