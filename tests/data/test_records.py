from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from shearling.data import records
from shearling.data.domains import find_domains
from shearling.data.records import Chat, Document, Exchange, Record, digest, read, split, suffix_of
from shearling.errors import ShearlingError

TEXTS = ["A sheep.", "Zwei Schäfer\nund ein Hund.", "三 sheep", " x ", "last"]


def lines(*values: Any) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def write(path: Path, values: list[Any], *, row_group: int = 2) -> Path:
    """The same records in whatever kind of file the name asks for."""
    content = lines(*values)
    match suffix_of(path):
        case ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist(values), path, row_group_size=row_group)
        case ".jsonl.gz":
            path.write_bytes(gzip.compress(content))
        case ".jsonl.zst":  # two frames, as of two files put together
            path.write_bytes(zstd(content[:37]) + zstd(content[37:]))
        case _:
            path.write_bytes(content)
    return path


def everything(file: Path, shard_bytes: int = records.SHARD_BYTES) -> list[Record | None]:
    return [record for shard in split(file, shard_bytes) for _, record in read(shard)]


def one(tmp_path: Path, value: Any) -> Record | None:
    (record,) = everything(write(tmp_path / "one.jsonl", [value]))
    return record


def refusal(file: Path, shard_bytes: int = records.SHARD_BYTES) -> str:
    with pytest.raises(ShearlingError) as error:
        everything(file, shard_bytes)
    sentence = str(error.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "A.PARQUET"])
@pytest.mark.parametrize("shard_bytes", [1, 60, 10**6])
def test_every_kind_of_file_gives_the_same(tmp_path: Path, name: str, shard_bytes: int) -> None:
    file = write(tmp_path / name, [{"text": text, "source": 1} for text in TEXTS])
    assert everything(file, shard_bytes) == [Document(text) for text in TEXTS]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_bytes(b"\xef\xbb\xbf" + "Kapitel 1\n\nSchäfchen\n".encode())
    assert everything(file, 3) == [Document("Kapitel 1\n\nSchäfchen\n")]


@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=12), max_size=12),
    blanks=st.lists(st.booleans(), min_size=12, max_size=12),
    ending=st.booleans(),
    shard_bytes=st.integers(1, 70),
)
def test_a_file_in_shards_is_the_file(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str], blanks: list[bool], ending: bool, shard_bytes: int,
) -> None:  # fmt: skip
    """Every line once, in order, and each under the number it has in the file."""
    expected: dict[int, Record | None] = {}
    content = b""
    number = 0
    for text, blank in zip(texts, blanks, strict=False):
        if blank:
            content, number = content + b"\n", number + 1
        content, number = content + lines({"text": text}), number + 1
        expected[number] = Document(text) if text.strip() else None
    file = tmp_path_factory.getbasetemp() / "shards.jsonl"
    file.write_bytes(content if ending else content[:-1])
    found: dict[int, Record | None] = {}
    for shard in split(file, shard_bytes):
        for local, record in read(shard):
            place = shard.where(local)
            assert place.endswith(f" of {file}")
            found[int(place.split()[1])] = record
    assert found == expected
    assert list(found) == sorted(found)


def test_lines_of_a_large_file_are_numbered_through(tmp_path: Path) -> None:
    """Though it is counted in blocks."""
    values = [{"text": "sheep " * 50_000}] * 9
    file = write(tmp_path / "large.jsonl", [*values, {"txt": "goat"}])
    assert file.stat().st_size > 2 * 2**20
    assert refusal(file, file.stat().st_size - 10).startswith(f"Line 10 of {file}")
    assert refusal(file, 1_000_000).startswith(f"Line 10 of {file}")


def test_rows_of_a_parquet_are_numbered_through(tmp_path: Path) -> None:
    values: list[Any] = [{"text": text} for text in TEXTS]
    file = write(tmp_path / "a.parquet", values)
    assert len(split(file, 1)) == 3
    assert len(split(file, 10**9)) == 1
    places = [shard.where(n) for shard in split(file, 1) for n, _ in read(shard)]
    assert places == [f"Row {n} of {file}" for n in range(1, 6)]
    values[3] = {"text": None}
    assert refusal(write(file, values), 1).startswith(
        f'Row 4 of {file} has null as "text", where a string was expected; each must be'
    )


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"text": 5}, 'has a number as "text", where a string was expected'),
        ({"text": ["a"]}, 'has a list as "text", where a string was expected'),
        ({"messages": "a"}, 'has a string as "messages", where a list was expected'),
        ({"question": "a", "answer": True}, 'has true or false as "answer", where a string was'),
        ({"prompt": {}, "answer": "a"}, 'has an object as "prompt", where a string was expected'),
        (5, "is a number; each must be"),
        ({"question": "a"}, "has the keys question; each must be"),
    ],
)
def test_a_key_of_another_kind_is_named(tmp_path: Path, value: Any, said: str) -> None:
    assert f"Line 1 of {tmp_path / 'a.jsonl'} {said}" in refusal(
        write(tmp_path / "a.jsonl", [value])
    )


def test_columns_that_are_not_known_are_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [{"body": "a", "id": 1}])
    assert f"Row 1 of {file} has the keys body, id; each must be" in refusal(file)


CHAT = [("user", "Baa?"), ("assistant", "Baa.")]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"text": "a"}, Document("a")),
        ({"text": "half \ud83d of it"}, Document("half \ufffd of it")),
        ({"instruction": "Count.", "output": "1"}, Exchange("Count.\n\n", "1")),
        (
            {"instruction": "Count.", "input": "sheep", "output": "1", "text": "all of it"},
            Exchange("Count.\n\nsheep\n\n", "1"),
        ),
        ({"instruction": "Count.", "input": "", "output": "1"}, Exchange("Count.\n\n", "1")),
        ({"question": "How many?", "answer": "1"}, Exchange("How many?\n\n", "1")),
        ({"prompt": "Say", "response": "1"}, Exchange("Say\n\n", "1")),
        ({"prompt": "One, ", "completion": "two"}, Exchange("One, ", "two")),
        ({"prompt": "", "completion": "two"}, Exchange("", "two")),
        ({"question": "no string", "answer": ["1"], "text": "a"}, Document("a")),
        ({"messages": [{"role": r, "content": c} for r, c in CHAT]}, Chat(tuple(CHAT))),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Baa?"},
                    {"from": "gpt", "value": "Baa."},
                ]
            },
            Chat((("user", "Baa?"), ("assistant", "Baa."))),
        ),
        ({"text": " \n\t"}, None),
        ({"instruction": "Count.", "output": " "}, None),
        ({"messages": [{"role": "user", "content": "Baa?"}]}, None),
        ({"messages": [{"role": "assistant", "content": "\n"}]}, None),
        ({"messages": []}, None),
    ],
)  # fmt: skip
def test_kinds_of_records(tmp_path: Path, value: Any, expected: Record | None) -> None:
    assert one(tmp_path, value) == expected


def test_messages_of_a_parquet(tmp_path: Path) -> None:
    messages = [{"role": role, "content": content} for role, content in CHAT]
    file = write(tmp_path / "chat.parquet", [{"messages": messages, "id": 7}])
    assert everything(file) == [Chat(tuple(CHAT))]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (lines({"text": "a"}) + b'{"text": "b"', ("Line 2", "not JSON")),
        (lines({"text": "a"}, {"txt": "b"}), ("Line 2", "has the keys txt", '"messages"')),
        (lines({"text": "a"}, {"text": 3}), ("Line 2", '"text"')),
        (lines({"text": "a"}, {}), ("Line 2", "(none)")),
        (lines({"text": "a"}, "b"), ("Line 2", "is a string")),
        (lines({"text": "a"}) + b"\n\xff\n", ("Line 3", "UTF-8")),
        (lines({"text": "a"}) + b"[" * 100_000, ("Line 2", "not JSON")),
        (lines({"messages": [{"role": "user"}]}), ("Line 1", "message 1", '"content"')),
        (lines({"messages": ["Baa"]}), ("Line 1", "message 1", '"role"')),
        (lines({"conversations": [{"from": "gpt"}]}), ("Line 1", "message 1", '"value"')),
    ],
)
@pytest.mark.parametrize("shard_bytes", [5, 10**6])
def test_lines_that_will_not_do(
    tmp_path: Path, content: bytes, expected: tuple[str, ...], shard_bytes: int
) -> None:
    file = tmp_path / "wrong.jsonl"
    file.write_bytes(content)
    sentence = refusal(file, shard_bytes)
    assert all(part in sentence for part in (*expected, str(file)))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("damage", ["cut off", "another kind"])
def test_files_that_are_damaged(tmp_path: Path, name: str, damage: str) -> None:
    values = [{"text": f"{i} {'sheep' * (i % 7)}"} for i in range(5000)]
    file = write(tmp_path / name, values, row_group=1000)
    assert len(everything(file)) == 5000
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage == "cut off" else b"no such thing" * 20)
    sentence = refusal(file)
    assert str(file) in sentence
    assert "cannot be read" in sentence


def test_a_text_that_is_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("Schäfer".encode("latin-1"))
    assert refusal(file).startswith(f"{file} is not UTF-8")


def test_files_are_streamed(tmp_path: Path) -> None:
    """The first record is there before the broken end is met."""
    file = tmp_path / "a.jsonl.gz"
    content = gzip.compress(lines(*({"text": f"{i} sheep"} for i in range(200_000))))
    file.write_bytes(content[:-1000])
    (shard,) = split(file)
    assert next(read(shard)) == (1, Document("0 sheep"))


def test_a_digest_is_of_the_record_and_the_seed() -> None:
    different: list[Record] = [
        Document("a"), Document("b"), Exchange("a", "b"), Exchange("ab", ""), Exchange("", "ab"),
        Chat((("user", "a"),)), Chat((("assistant", "a"),)),
    ]  # fmt: skip
    found = {digest(record, seed) for record in different for seed in (0, 1, 12)}
    assert len(found) == 3 * len(different)
    assert all(0 <= each < 2**64 for each in found)
    # Stored by every pack: a change would move documents from one part to the other.
    assert digest(Document("a sheep"), 0) == 3172896709928644037
    # Whether U+1FAE8 counts as printable depends on the version of Python.
    asked = "Exchange(prompt='\\U0001fae8', answer='b\\xe4')"
    assert digest(Exchange("\U0001fae8", "b\u00e4"), 7) == digest(Document(asked), 7)


# --- domains


def names(*specs: object) -> dict[str, list[str]]:
    found = find_domains([str(spec) for spec in specs])
    assert all(source.file.is_file() for sources in found.values() for source in sources)
    return {domain: [source.name for source in sources] for domain, sources in found.items()}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("web/b.jsonl", "web/sub/a.txt", "web/.git/c.txt", "web/.d.txt", "web/notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    for name in ("wiki.jsonl.gz", "code.parquet", "a=b.txt"):
        (tmp_path / name).write_text("{}")
    return tmp_path


def test_names_of_domains(tree: Path) -> None:
    assert names(tree / "web", tree / "wiki.jsonl.gz", tree / "code.parquet") == {
        "code": ["code.parquet"], "web": ["b.jsonl", "sub/a.txt"], "wiki": ["wiki.jsonl.gz"],
    }  # fmt: skip
    assert list(names(tree / "wiki.jsonl.gz", tree / "code.parquet")) == ["code", "wiki"]
    assert names(tree / "[wc]*.*") == {"code": ["code.parquet"], "wiki": ["wiki.jsonl.gz"]}
    assert names(f"all={tree / '*i*.gz'}") == {"all": ["wiki.jsonl.gz"]}
    assert names(f"all={tree / 'w*'}") == {"all": ["web/b.jsonl", "web/sub/a.txt", "wiki.jsonl.gz"]}
    assert names(f"deep={tree / '**/*.txt'}")["deep"] == ["a.txt", "a=b.txt"]
    assert names(f"odd={tree / 'a=b.txt'}") == {"odd": ["a=b.txt"]}


def test_a_path_with_an_equals_sign(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    with pytest.raises(ShearlingError, match="NAME=a=b.txt"):
        find_domains(["a=b.txt"])


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        (["{}/web", "web={}/wiki.jsonl.gz"], ("two domains", "'web'", "NAME=PATH")),
        (["{}/web", "Web={}/wiki.jsonl.gz"], ("two domains", "'Web'")),
        (["{}/web/notes.md"], ("notes.md", ".parquet")),
        (["x={}/web/*"], ("notes.md", ".parquet")),
        (["{}/web/.git/../.e"], ("no text at", ".jsonl")),
        (["{}/absent*.txt"], ("absent*.txt", "glob")),
        (["x={}/absent"], ("absent",)),
        (["{}/empty"], ("empty", "holds no text")),
        (["../up={}/web"], ("../up={}/web",)),
        (["a b={}/web"], ("'a b'", "NAME=")),
        ([".={}/web"], ("'.'",)),
        ([".unfinished={}/web"], ("'.unfinished'",)),
        ([], ("no files",)),
    ],
)
def test_domains_that_will_not_do(tree: Path, specs: list[str], expected: tuple[str, ...]) -> None:
    (tree / "empty").mkdir()
    with pytest.raises(ShearlingError) as error:
        find_domains([spec.format(tree) for spec in specs])
    assert all(part.format(tree) in str(error.value) for part in expected)
