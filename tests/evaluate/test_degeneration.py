from __future__ import annotations

import pytest
import torch

from shearling.errors import ShearlingError
from shearling.evaluate.degeneration import (
    Beginnings,
    continue_all,
    degeneration,
    ends_in_a_loop,
    held_out,
    repetition,
)
from shearling.evaluate.generation import Sampling, generate


@pytest.fixture
def ascii_model(model):
    """Only tokens that are characters on their own can win, so that text can be compared."""
    keep = torch.zeros(300, dtype=torch.bool)
    keep[:94] = True
    keep[257] = True
    model.lm_head.weight.data[~keep] = 0
    return model


PROMPTS = ["Once upon a ", "time, a ram ", "and his ewe ", "lived in a f", "old of stone"]


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_equal_to_one_prompt_at_a_time(ascii_model, tokenizer, temperature, batch):
    options = {"temperature": temperature, "top_p": 0.9, "seed": 4}
    single = generate(ascii_model, tokenizer, PROMPTS, Sampling(max_new_tokens=20, **options))
    rows = torch.tensor(tokenizer(PROMPTS)["input_ids"])
    found = continue_all(
        ascii_model, tokenizer, rows, Sampling(max_new_tokens=20, **options), batch=batch
    )
    assert [tokenizer.decode(tokens) for tokens in found] == [one["text"] for one in single]
    assert len({tuple(tokens) for tokens in found}) > 1


def test_a_row_that_ends_is_short_and_the_others_go_on(ascii_model, tokenizer):
    rows = torch.tensor(tokenizer(PROMPTS)["input_ids"])
    whole = continue_all(ascii_model, tokenizer, rows, Sampling(max_new_tokens=12))
    end = whole[0][3]
    ascii_model.generation_config.eos_token_id = [end]
    found = continue_all(ascii_model, tokenizer, rows, Sampling(max_new_tokens=12))
    expected = [row[: row.index(end)] if end in row else row for row in whole]
    assert found == expected
    assert len({len(row) for row in found}) > 1


def test_distinct_and_repeated_by_hand():
    found = repetition([[1, 2, 1, 2, 1, 2], [3, 3, 3]])
    assert found["distinct"] == {
        "1": pytest.approx(3 / 9),
        "2": pytest.approx(3 / 7),  # 12 21 33
        "3": pytest.approx(3 / 5),  # 121 212 333
    }
    assert found["repetition_4"] == pytest.approx(1 / 3)  # of 1212 2121 1212; the other has none
    assert found["loops"] == 1.0
    fresh = repetition([range(10)])
    assert fresh["distinct"] == {"1": 1.0, "2": 1.0, "3": 1.0}
    assert (fresh["repetition_4"], fresh["loops"]) == (0.0, 0.0)
    nothing = repetition([[], []])
    assert nothing["distinct"] == {"1": None, "2": None, "3": None}
    assert (nothing["repetition_4"], nothing["loops"]) == (None, 0.0)


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        ("abcabcabc", True),
        ("xyzabcabcabc", True),
        ("abcabc", False),
        ("abcabcabcd", False),
        ("...", True),
        ("ab", False),
        ("", False),
    ],
)
def test_loops(text, loop):
    assert ends_in_a_loop([ord(c) for c in text]) is loop


def test_prompts_are_documents_beginnings_or_spread_windows(tokenizer):
    documents = ["short", "a" * 40, "b" * 50]
    rows = held_out(documents, tokenizer, 2, 20)
    assert [tokenizer.decode(row) for row in rows] == ["a" * 20, "b" * 20]
    [text] = ["".join(chr(97 + i // 10) for i in range(200))]
    spread = [tokenizer.decode(row) for row in held_out([text], tokenizer, 5, 10)]
    assert spread == ["a" * 10, "e" * 10, "i" * 10, "m" * 10, "q" * 10]
    spread = [tokenizer.decode(row)[0] for row in held_out([text], tokenizer, 11, 10)]
    assert "".join(spread) == "abdfhjkmoqs", "over the whole text, not its first half"


def test_a_models_loops_beside_the_texts_own(model, tokenizer):
    for module in model.model.layers:  # the next token follows from the last alone
        torch.nn.init.zeros_(module.self_attn.o_proj.weight)
        torch.nn.init.zeros_(module.mlp.down_proj.weight)
    text = ["".join(chr(33 + (7 * i * i + i) % 90) for i in range(60 + k)) for k in range(4)]
    found = degeneration(model, tokenizer, text, Beginnings(count=3, tokens=4), Sampling(50))
    assert (found["prompts"], found["prompt_tokens"], found["new_tokens"]) == (3, 4, 50)
    assert found["sampling"] == {"method": "greedy"}
    assert found["reference"]["loops"] == 0
    assert found["repetition_4"] > found["reference"]["repetition_4"]
    sampled = degeneration(
        model, tokenizer, text, Beginnings(count=3, tokens=4), Sampling(8, temperature=1.0, seed=3)
    )
    assert sampled["sampling"] == {"temperature": 1.0, "top_p": 1.0, "seed": 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "prompts is 0"),
        ({"tokens": 40}, "40 tokens and 30 new ones .* 64 positions"),
        ({"tokens": 20}, "13 tokens, but one window needs 50"),
    ],
)
def test_refuses(model, tokenizer, options, message):
    with pytest.raises(ShearlingError, match=message):
        degeneration(model, tokenizer, ["no more text."], Beginnings(**options), Sampling(30))
