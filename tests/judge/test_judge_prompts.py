from __future__ import annotations

import json

import pytest

from shearling.errors import ShearlingError
from shearling.judge.kept import KeptLines, key_of
from shearling.judge.prompts import read_answers, read_prompts


def test_reads_lines_of_json_and_text(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(
        '{"prompt": "a\u2028b"}\n\n{"instruction": "sum up", "input": "a text"}\n'
        '{"instruction": "greet", "input": ""}\n{"prompt": "a\u2028b"}\n'
    )
    found = read_prompts(file)
    assert found.texts == ("a\u2028b", "sum up\n\na text", "greet")
    assert found.repeated == 1
    assert read_prompts(file, limit=2).texts == found.texts[:2]
    (tmp_path / "p.txt").write_text("one\n\n  two \n")
    assert read_prompts(tmp_path / "p.txt").texts == ("one", "two")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"question": "b"}\n', r"line 2 of .*its fields are question"),
        ("p.jsonl", '{"prompt": 3}\n', r"line 1 of .* has a 'prompt' that is not text"),
        ("p.jsonl", '{"prompt": " "}\n', r"line 1 of .* or is empty"),
        ("p.jsonl", '{"instruction": "a", "input": 3}\n', r"line 1 of .*'input' that is not text"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', r"line 3 of .* is not valid JSON"),
        ("p.jsonl", "[]\n", r"line 1 of .* is a list, not an object"),
        ("p.jsonl", "\n", r"p\.jsonl holds no prompt"),
        ("p.txt", " \n", r"p\.txt holds no prompt"),
        ("p.csv", "a\n", r"p\.csv is neither \.jsonl nor \.txt"),
    ],
)
def test_refuses(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ShearlingError, match=message):
        read_prompts(tmp_path / name)


def test_refuses_a_file_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(ShearlingError, match=r"absent\.txt cannot be read \(No such file"):
        read_prompts(tmp_path / "absent.txt")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ShearlingError, match="it is not UTF-8"):
        read_prompts(tmp_path / "b.txt")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"prompt": "a"}], r"line 1 of .* has no 'answer' that is text"),
        ([{"answer": "a"}], r"line 1 of .* has neither a 'prompt' nor"),
        (
            [{"prompt": "a", "answer": "x"}, {"prompt": "a", "answer": "y"}],
            r"line 2 of .* answers a prompt that has another answer above",
        ),
    ],
)
def test_refuses_answers(tmp_path, lines, message):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ShearlingError, match=message):
        read_answers(file)


def test_what_is_kept_survives_a_torn_last_line(tmp_path):
    file = tmp_path / "deep" / "kept.jsonl"
    kept = KeptLines(file)
    kept.add("a", {"x": "ä\u2028"})
    kept.add("b", {"x": 2})
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"key": "c", "x"')
    again = KeptLines(file)
    assert [again.get(key) for key in "abc"] == [
        {"key": "a", "x": "ä\u2028"},
        {"key": "b", "x": 2},
        None,
    ]
    again.add("c", {"x": 3})
    assert file.read_bytes() == whole + b'{"key": "c", "x": 3}\n'


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "kept.jsonl").write_text('{"key": "a"}\n{"key": \n{"key": "b"}\n')
    with pytest.raises(ShearlingError, match=r"line 2 of .*kept\.jsonl is damaged"):
        KeptLines(tmp_path / "kept.jsonl")


def test_a_key_tells_parts_apart():
    assert key_of("a", {"x": 1, "y": 2}) == key_of("a", {"y": 2, "x": 1})
    assert len({key_of("ab"), key_of("a", "b"), key_of(["a", "b"]), key_of("b", "a")}) == 4
