"""Likelihoods and what is written, against stock transformers an item at a time."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shearling.errors import ShearlingError
from shearling.evaluate.abilities.items import Item
from shearling.evaluate.abilities.kinds import ABILITIES
from shearling.evaluate.abilities.measure import Asking, figures_of, measure_abilities
from shearling.evaluate.abilities.results import Abilities, AbilityFigures
from shearling.evaluate.abilities.scoring import encode_item, score_items
from shearling.evaluate.abilities.shares import mean_share, moved, shares
from shearling.evaluate.degeneration import repetition
from shearling.model.refs import ModelRef
from tiny_llama import tiny_llama
from tiny_tokenizer import byte_tokenizer

EOS = 257


def long_llama(seed: int = 0) -> LlamaForCausalLM:
    """Room for every item, a token a byte."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=36, num_attention_heads=9, num_key_value_heads=3, head_dim=4,
        intermediate_size=50, num_hidden_layers=1, vocab_size=260, max_position_embeddings=8192,
        initializer_range=0.3, bos_token_id=256, eos_token_id=EOS,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return long_llama()


@pytest.fixture(scope="module")
def items() -> list[Item]:
    asked = ("copying", "sums", "spelling", "sorting", "counting", "german")
    return [item for one in ABILITIES if one.name in asked for item in one.items(0, 1)]


@torch.inference_mode()
def stock(model: LlamaForCausalLM, item: Item, first: list[int]) -> tuple[float, str, int]:
    """An item's nats a token, its line and the tokens written, by transformers' own generate."""
    tokenizer = byte_tokenizer()
    prompt = [*first, *tokenizer(item.prompt)["input_ids"]]
    answer = tokenizer(item.answer + "\n")["input_ids"]
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
    nll = -sum(float(logits[len(prompt) + n - 1, token]) for n, token in enumerate(answer))
    ids = torch.tensor([prompt])
    most = 2 * len(answer) + 8
    whole = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False,
        pad_token_id=0, eos_token_id=EOS,
    )  # fmt: skip
    written = whole[0, len(prompt) :].tolist()
    newline = tokenizer("\n")["input_ids"][0]
    if newline in written:
        written = written[: written.index(newline) + 1]
    kept = [token for token in written if token != EOS]
    text = str(tokenizer.decode(kept, skip_special_tokens=True))
    return nll / len(answer), text.split("\n")[0].strip(), len(kept)


@pytest.mark.parametrize("bos", [False, True])
def test_equal_to_the_stock_model_in_any_batch(
    model: LlamaForCausalLM, items: list[Item], bos: bool
) -> None:
    tokenizer = byte_tokenizer()
    expected = [stock(model, item, [256] if bos else []) for item in items]
    lengths = {encode_item(tokenizer, item, None).context for item in items}
    assert len(lengths) == len(items)
    for batch in (None, 1, 4):
        scored = score_items(model, tokenizer, items, bos=bos, batch=batch)
        for one, (nll, text, tokens) in zip(scored, expected, strict=True):
            assert one.nll == pytest.approx(nll, abs=1e-5)
            assert (one.text, one.tokens) == (text, tokens)
    assert len({tokens for _, _, tokens in expected}) > 3


def taught(items: list[Item], *, last: int | None = None) -> LlamaForCausalLM:
    """A model that knows the items by heart; ``last`` is what it says in place of a line's end."""
    model, tokenizer = long_llama(), byte_tokenizer()
    rows = [encode_item(tokenizer, item, None).ids for item in items]

    def forward(ids: torch.Tensor, *, logits_to_keep: int, **_: Any) -> Any:
        logits = torch.zeros(*ids.shape, 260)
        for place, given in enumerate(ids.tolist()):
            row = next(row for row in rows if list(row[: len(row) - 1]) == given[: len(row) - 1])
            following = [*row[1:-1], row[-1] if last is None else last]
            logits[place, range(len(following)), following] = 1e4
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])

    model.forward = forward  # ty: ignore
    return model


def test_a_model_that_knows_the_answers_is_right(items: list[Item]) -> None:
    figures = figures_of(score_items(taught(items), byte_tokenizer(), items))
    assert (figures.exact, figures.nll) == (1.0, 0.0)
    assert figures.tokens == figures.expected_tokens
    assert figures.exact_interval == pytest.approx((6 / (6 + 1.959964**2), 1.0))


def test_ending_the_text_ends_the_line(items: list[Item]) -> None:
    scored = score_items(taught(items, last=EOS), byte_tokenizer(), items)
    assert all(one.exact and one.tokens == one.expected_tokens - 1 for one in scored)
    assert all(one.nll * one.expected_tokens == pytest.approx(1e4) for one in scored)


def test_one_who_never_ends_is_stopped_and_wrong(items: list[Item]) -> None:
    model = long_llama()
    model.lm_head.weight.data.zero_()  # all tokens alike: the first one is taken
    scored = score_items(model, byte_tokenizer(), items)
    assert not any(one.exact for one in scored)
    assert all(one.tokens == 2 * one.expected_tokens + 8 for one in scored)
    assert all(one.nll == pytest.approx(math.log(260)) for one in scored)


def test_what_cannot_be_asked_is_refused(items: list[Item]) -> None:
    with pytest.raises(ShearlingError, match="more than the model's 64 positions"):
        score_items(tiny_llama(), byte_tokenizer(), items)
    with pytest.raises(ShearlingError, match="batch is 0"):
        score_items(long_llama(), byte_tokenizer(), items, batch=0)
    broken = long_llama()
    broken.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(ShearlingError, match="not numbers"):
        score_items(broken, byte_tokenizer(), items)
    for wrong in ({"limit": 0}, {"seed": -1}):
        with pytest.raises(ShearlingError):
            Asking(**wrong)


def test_a_prompt_that_grows_into_its_answer() -> None:
    def joined(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [7 if pair == "= " else ord(pair[0]) for pair in text.split("|")]}

    row = encode_item(joined, Item("a|b|=", " |c"), 1)  # ty: ignore
    assert row.ids[0] == 1
    assert row.context == 3


def test_a_file_of_all_abilities() -> None:
    model = long_llama()
    model.lm_head.weight.data.zero_()
    model.generation_config.eos_token_id = [0]  # the likeliest token ends every answer at once
    subject: Any = SimpleNamespace(name="ewe", fingerprint="ab" * 32)
    file = measure_abilities(subject, model, byte_tokenizer(), Asking(limit=1))
    assert list(file["abilities"]) == [*(one.name for one in ABILITIES), "free writing"]
    assert all(of["tokens"] == of["exact"] == 0.0 for of in list(file["abilities"].values())[:-1])
    writing = file["abilities"]["free writing"]
    assert writing["exact"] is None
    assert 0 <= writing["repetition_4"] <= 1
    assert writing["losses"] == [writing["repetition_4"]]
    assert (file["limit"], file["bos"], file["seed"]) == (1, False, 0)


def abilities(losses: dict[str, list[float]], lengths: list[int], **changes: Any) -> Abilities:
    figures = {
        name: AbilityFigures(tokens=3.0, losses=tuple(of), lengths=tuple(lengths))
        for name, of in losses.items()
    }
    values = {"model": ModelRef("ewe", "ab" * 32), "seed": 0, "asked_sha256": "a"}
    return Abilities(**(values | {"abilities": figures} | changes))


def test_shares_by_hand() -> None:
    source = abilities({"sums": [1.0, 2.0, 3.0], "copying": [0.5, 0.5, 0.5]}, [1, 2, 4])
    model = abilities({"copying": [0.5, 0.5, 0.5], "sums": [1.1, 2.2, 3.6]}, [1, 2, 4])
    sums, copying = shares(source, model)
    assert (sums.ability, copying.ability) == ("sums", "copying")
    assert sums.left == pytest.approx(math.exp(-0.3))
    error = math.sqrt(((0.1 - 0.3) ** 2 + (0.2 - 0.3) ** 2 + (0.6 - 0.3) ** 2) / 2 / 3)
    assert sums.interval == pytest.approx(
        (math.exp(-0.3 - 1.959964 * error), math.exp(-0.3 + 1.959964 * error)), rel=1e-6
    )
    assert (copying.left, copying.interval, copying.low) == (1.0, (1.0, 1.0), False)
    both = mean_share([sums, copying])
    assert both.left == pytest.approx(math.sqrt(sums.left))
    assert both.error == pytest.approx(error / 2)
    sizes = [0.1, 0.2, 0.6, 0.0, 0.0, 0.0]
    mean, low, high = moved(source, model)
    assert mean == pytest.approx(0.15)
    spread = math.sqrt(sum((size - 0.15) ** 2 for size in sizes) / 5 / 6)
    assert (mean - low, high - mean) == pytest.approx((1.959964 * spread, 1.959964 * spread))
    assert moved(source, source) == (0.0, 0.0, 0.0)
    assert shares(source, abilities({"sums": [1.0] * 3}, [1, 2, 4], asked_sha256="b")) == []


def test_other_tokens_for_the_same_text_make_no_difference() -> None:
    source = abilities({"sums": [1.0, 2.0]}, [2, 3])
    spelled = abilities({"sums": [0.5, 1.0]}, [4, 6])  # as many nats in twice the tokens
    assert shares(source, spelled)[0].left == 1.0


def test_repetition_of_one_text() -> None:
    assert repetition([[1, 2, 3, 4] * 2])["repetition_4"] == pytest.approx(1 / 5)
