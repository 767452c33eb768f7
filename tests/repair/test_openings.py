"""Text that an instruct model writes itself, from behind its chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import naive
from places import place
from shearling.data.bos import TokenWindows
from shearling.data.sources import TextSource
from shearling.engine.moments import held_rows
from shearling.engine.stream import BlockStream
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.repair.openings import Openings, behind_template, check_written_from, openings_of
from shearling.repair.written import PREFIX, write
from tiny_tokenizer import BOS, CHAT, byte_tokenizer, write_llama

QUESTIONS = [f"{n} or {n + 1}?" for n in range(12)]
ANSWERING = "{% if add_generation_prompt %}<assistant>{% endif %}"


def talks(file: Path, *, system: str = "") -> TextSource:
    first = [{"role": "system", "content": system}] if system else []
    answer = {"role": "assistant", "content": "x"}
    lines = [
        {"messages": [*first, {"role": "user", "content": said}, answer]} for said in QUESTIONS
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return TextSource(file, "chat", 0.5)


def web(file: Path) -> TextSource:
    lines = [{"text": f"{letter * 20} and the rest"} for letter in "abcdefgh"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return TextSource(file, "web", 0.5)


def chatty(template: str | None = CHAT, *, adds_bos: bool = False) -> Any:
    tokenizer = byte_tokenizer(adds_bos=adds_bos)
    tokenizer.chat_template = template
    return tokenizer


def opened(sources: list[TextSource], tokenizer: Any, count: int = 8, length: int = 80) -> Any:
    return openings_of(sources, tokenizer, count, length, seed=1, bos=None, every=True)


def said(tokenizer: Any, openings: Openings) -> list[str]:
    return [str(tokenizer.decode(prompt)) for prompt in openings.prompts]


@pytest.mark.parametrize("template", [CHAT, CHAT.replace(ANSWERING, "")])
def test_openings_are_what_transformers_makes_of_the_users_turns(
    tmp_path: Path, template: str
) -> None:
    """Of the conversations alone, though there are documents; each at most once."""
    tokenizer = chatty(template)
    found = said(
        tokenizer, opened([web(tmp_path / "w.jsonl"), talks(tmp_path / "t.jsonl")], tokenizer)
    )
    asked = [
        chatty().apply_chat_template(
            [{"role": "user", "content": one}], tokenize=False, add_generation_prompt=True
        )
        for one in QUESTIONS
    ]
    assert len(set(found)) == len(found) == 8
    assert set(found) <= set(asked)


def test_without_conversations_the_first_tokens_of_documents_ask(tmp_path: Path) -> None:
    tokenizer = chatty()
    found = said(tokenizer, opened([web(tmp_path / "web.jsonl")], tokenizer, count=5))
    expected = {f"<user>{letter * 16}<assistant>" for letter in "abcdefgh"}
    assert len(set(found)) == 5
    assert set(found) <= expected


def test_of_one_long_document_lines_ask(tmp_path: Path) -> None:
    file, tokenizer = tmp_path / "book.txt", chatty()
    lines = [f"{letter * 20}\n" for letter in "abcdefghijklmnopqrstuvwxyz"]
    file.write_text("".join(lines))
    found = said(tokenizer, opened([TextSource(file)], tokenizer, count=12))
    assert len(found) == 12
    assert len(set(found)) > 4
    assert set(found) <= {f"<user>{line[:16]}<assistant>" for line in lines}


def test_what_does_not_fit_is_shortened(tmp_path: Path) -> None:
    """The system's turn stays if there is room for it, and goes if there is none."""
    tokenizer = chatty()
    source = talks(tmp_path / "t.jsonl", system="Be kind.")
    full = said(tokenizer, opened([source], tokenizer, length=2 * 40))
    assert all(one.startswith("<system>Be kind.<user>") for one in full)
    short = said(tokenizer, opened([source], tokenizer, length=2 * 36))
    assert all(len(one) <= 36 and one.startswith("<system>Be kind.<user>") for one in short)
    less = said(tokenizer, opened([source], tokenizer, length=2 * 20))
    assert set(less) <= {f"<user>{q[:3]}<assistant>" for q in QUESTIONS}
    with pytest.raises(
        ShearlingError, match="of 20 tokens .* more than half; give a larger --length"
    ):
        opened([source], tokenizer, length=20)


def test_a_bos_begins_once(tmp_path: Path) -> None:
    source = talks(tmp_path / "t.jsonl")
    for template in (CHAT, "<s>" + CHAT):
        tokenizer = chatty(template, adds_bos=True)
        for prompt in opened([source], tokenizer).prompts:
            assert prompt[0] == BOS
            assert BOS not in prompt[1:]


def test_no_template(tmp_path: Path) -> None:
    with pytest.raises(
        ShearlingError, match="but its tokenizer has none; take --written-from text"
    ):
        opened([web(tmp_path / "w.jsonl")], chatty(None))


def test_what_written_text_begins_with_is_one_of_three() -> None:
    assert check_written_from("both") == "both"
    with pytest.raises(ShearlingError, match="from 'chat' .*one of text, template, both"):
        check_written_from("chat")


@pytest.mark.parametrize(("sequences", "windows"), [(64, 16), (12, 12), (40, 10), (7, 9)])
def test_half_begin_behind_the_template(sequences: int, windows: int) -> None:
    behind_N = behind_template(sequences, windows, every=False)
    held_N = held_rows(sequences, windows)
    for kind in (True, False):
        mine = behind_N[held_N == kind]
        assert abs(2 * int(mine.sum()) - len(mine)) <= 2
    for window in range(min(windows, sequences)):
        turns = behind_N[window::windows].int().tolist()
        assert abs(2 * sum(turns) - len(turns)) <= 1, "those of one window take turns"
    assert behind_template(sequences, windows, every=True).all()


def test_held_out_openings_are_seen_nowhere_else() -> None:
    prompts = tuple((n, n, n, n, n, n) for n in range(1, 9))
    written_NS, held_N = torch.zeros(24, 20, dtype=torch.long), held_rows(24, 12)
    given_NT = Openings(prompts, True).put(written_NS, 12, PREFIX)
    assert given_NT.sum(1).tolist() == [2] * 24
    held = set(written_NS[held_N, 0].tolist())
    assert held == {4, 8}
    assert held.isdisjoint(written_NS[~held_N, 0].tolist())


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("openings") / "model"
    return write_llama(path, layers=3, template=CHAT, positions=64)


def test_what_the_model_writes_behind_them(chat_model: Path, tmp_path: Path) -> None:
    """Rows from the text are what they were; the others go on as the stock model says."""
    checkpoint = Checkpoint.open(chat_model)
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    length, sequences = 56, 8
    windows = torch.randint(3, 250, (4, length), generator=torch.Generator().manual_seed(5))
    openings = openings_of(
        [talks(tmp_path / "t.jsonl")], tokenizer, sequences, length, seed=2, bos=None, every=False
    )
    stream = BlockStream(checkpoint, place())
    plain = write(stream, TokenWindows(windows), sequences, seed=3)
    found = write(stream, TokenWindows(windows), sequences, seed=3, openings=openings)
    behind_N = behind_template(sequences, len(windows), every=False)
    assert torch.equal(found[~behind_N], plain[~behind_N])
    generator = torch.Generator().manual_seed(3)
    torch.randint(length - PREFIX + 1, (sequences, 1), generator=generator)
    at_NT = torch.rand(sequences, length - PREFIX, generator=generator)
    stock, by_start = naive.stock(chat_model), {one[:12]: one for one in openings.prompts}
    for row, at_T in zip(found[behind_N], at_NT[behind_N], strict=True):
        prompt = by_start[tuple(row[:12].tolist())]
        assert row[: len(prompt)].tolist() == list(prompt)
        with torch.no_grad():
            sums_SV = stock(input_ids=row[None]).logits[0].double().softmax(-1).cumsum(-1)
        for place_ in range(len(prompt), length):
            token, at = int(row[place_]), float(at_T[place_ - PREFIX])
            low = float(sums_SV[place_ - 1, token - 1]) if token else 0.0
            assert low - 1e-5 < at < float(sums_SV[place_ - 1, token]) + 1e-5
