"""Calibration windows of several sources, and conversations as the model's template has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shearling.data import calibration
from shearling.data.calibration import Drawing, mixed_windows, origins, source_documents
from shearling.data.documents import documents
from shearling.data.sources import TextSource
from shearling.data.text import calibration_windows
from shearling.errors import ShearlingError
from tiny_tokenizer import BOS, CHAT, byte_tokenizer

TALK = [
    {"role": "system", "content": "Mind the flock."},
    {"role": "user", "content": "How many sheep are in the pen?"},
    {"role": "assistant", "content": "Twelve, and a goat."},
]
SHAREGPT = [{"from": "human", "value": "And now?"}, {"from": "gpt", "value": "Eleven."}]


def write(file: Path, values: list[Any]) -> TextSource:
    file.write_text("".join(json.dumps(value) + "\n" for value in values))
    return TextSource(file, file.stem)


def texts(letter: str, count: int = 20) -> list[dict[str, str]]:
    return [{"text": letter * 60} for _ in range(count)]


def chatty(*, template: str | None = CHAT, adds_bos: bool = False) -> Any:
    tokenizer = byte_tokenizer(adds_bos=adds_bos)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("seed", [0, 3])
def test_one_source_is_what_it_was(tmp_path: Path, seed: int) -> None:
    """Bit for bit what is drawn of the file alone, named or not."""
    values = [{"text": f"{n} sheep in the fell, {n * n} in the pen" * (n % 3)} for n in range(40)]
    one, tokenizer = write(tmp_path / "web.jsonl", values), byte_tokenizer(adds_bos=True)
    found = mixed_windows([one], tokenizer, Drawing(samples=9, length=24, seed=seed))
    expected = calibration_windows(
        documents(one.file), tokenizer, samples=9, length=24, seed=seed
    )  # fmt: skip
    assert torch.equal(found.ids_NS, expected.ids_NS)
    assert found.bos == expected.bos == BOS


def test_windows_of_several_stand_where_the_order_says(tmp_path: Path) -> None:
    sources = [write(tmp_path / f"{letter}.jsonl", texts(letter)) for letter in "abc"]
    shares = zip(sources, (0.5, 0.3, 0.2), strict=True)
    sources = [TextSource(one.file, one.name, share) for one, share in shares]
    tokenizer = byte_tokenizer()
    drawing = Drawing(samples=20, length=24, seed=5)
    found = mixed_windows(sources, tokenizer, drawing)
    letters = [str(tokenizer.decode(row)) for row in found.ids_NS]
    assert letters == ["abc"[source] * 24 for source in origins(sources, 20, 5)]
    assert [sum(row[0] == letter for row in letters) for letter in "abc"] == [10, 6, 4]
    assert torch.equal(found.ids_NS, mixed_windows(sources, tokenizer, drawing).ids_NS)
    held = [row[0] for row in letters[3::4]]
    assert {held.count(letter) for letter in "abc"} <= {1, 2, 3}


def test_two_sources_of_one_file_give_different_windows(tmp_path: Path) -> None:
    values = [{"text": " ".join(map(str, range(n, n + 80)))} for n in range(0, 4000, 80)]
    file = write(tmp_path / "web.jsonl", values).file
    both = [TextSource(file, "a", 0.5), TextSource(file, "b", 0.5)]
    found = mixed_windows(both, byte_tokenizer(), Drawing(samples=8, length=40, seed=0))
    assert len({tuple(row.tolist()) for row in found.ids_NS}) == 8


def test_conversations_are_what_transformers_makes_of_them(tmp_path: Path) -> None:
    one = write(
        tmp_path / "talks.jsonl",
        [
            {"messages": TALK},
            {"text": "a document"},
            {"conversations": SHAREGPT},
            {"question": "Why?", "answer": "Wool."},
            {"messages": TALK, "text": "said already"},
            {"messages": [{"role": "user", "content": "Nobody answers."}]},
        ],
    )
    tokenizer = chatty()
    as_roles = [
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Eleven."},
    ]
    assert source_documents(one, tokenizer) == [
        tokenizer.apply_chat_template(TALK, tokenize=False), "a document",
        tokenizer.apply_chat_template(as_roles, tokenize=False), "Why?\n\nWool.", "said already",
    ]  # fmt: skip


@pytest.mark.parametrize(("bos", "begins"), [(None, False), (False, True)])
def test_a_bos_is_not_there_twice(tmp_path: Path, bos: bool | None, begins: bool) -> None:
    one = write(tmp_path / "talks.jsonl", [{"messages": TALK}])
    tokenizer = chatty(template="<s>" + CHAT, adds_bos=True)
    (text,) = source_documents(one, tokenizer, bos=bos)
    assert text.startswith("<s>") is begins
    assert text.removeprefix("<s>").startswith("<system>Mind")


def test_an_end_is_not_there_twice(tmp_path: Path) -> None:
    """A template that closes with EOS, where conversations are joined."""
    one = write(tmp_path / "talks.jsonl", [{"messages": TALK}, {"messages": TALK}])
    tokenizer = chatty(template=CHAT.replace("{% endfor %}", "</s>{% endfor %}"))
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    ids = tokenizer(text * 2, add_special_tokens=False)["input_ids"]
    found = mixed_windows([one], tokenizer, Drawing(samples=1, length=len(ids), seed=0))
    assert found.ids_NS[0].tolist() == ids


def test_no_template(tmp_path: Path) -> None:
    one = write(tmp_path / "talks.jsonl", [{"text": "sheep"}, {"messages": TALK}])
    with pytest.raises(
        ShearlingError,
        match=r"^Line 2 of .*talks.jsonl is a conversation, but the tokenizer has no chat "
        r"template; give a model that has one, as instruct models do, or documents.$",
    ):
        mixed_windows([one], chatty(template=None), Drawing(samples=1, length=4, seed=0))


def test_a_template_that_refuses(tmp_path: Path) -> None:
    one = write(tmp_path / "talks.jsonl", [{"messages": TALK}])
    tokenizer = chatty(template="{{ raise_exception('no system, please') }}")
    with pytest.raises(ShearlingError, match="Line 1 .* does not take .*no system, please"):
        source_documents(one, tokenizer)


def test_a_source_that_is_too_short_is_named(tmp_path: Path) -> None:
    sources = [
        write(tmp_path / "web.jsonl", texts("a")),
        write(tmp_path / "tiny.jsonl", texts("b", 1)),
    ]
    sources = [TextSource(s.file, s.name, 0.5) for s in sources]
    with pytest.raises(ShearlingError, match="source tiny: The text has 60 tokens, but 4 samples"):
        mixed_windows(sources, byte_tokenizer(), Drawing(samples=8, length=24, seed=0))
    (tmp_path / "tiny.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(ShearlingError, match="source tiny: .*tiny.jsonl holds no text"):
        mixed_windows(sources, byte_tokenizer(), Drawing(samples=8, length=24, seed=0))


def test_of_many_conversations_some_are_rendered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "CONVERSATIONS", 3)
    values = [
        {"messages": [*TALK[:1], {"role": "assistant", "content": f"{n}"}]} for n in range(30)
    ]
    one = write(tmp_path / "talks.jsonl", [*values, {"text": "a document"}])
    rendered: list[Any] = []
    render = calibration.render
    monkeypatch.setattr(
        calibration, "render", lambda *a, **o: rendered.append(a) or render(*a, **o)
    )
    found = mixed_windows([one], chatty(), Drawing(samples=2, length=20, seed=0))
    assert found.ids_NS.shape == (2, 20)
    assert len(rendered) == 3
    assert len(source_documents(one, chatty())) == 31, "all, where no windows are drawn"
