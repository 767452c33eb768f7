"""Documents read from files and directories."""

import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet

from shearling.data.documents import documents
from shearling.errors import ShearlingError


def jsonl(*texts: str) -> str:
    return "".join(json.dumps({"text": each}) + "\n" for each in texts)


def test_reads_jsonl_gzip_and_txt_in_sorted_order(tmp_path):
    (tmp_path / "b.jsonl").write_text(jsonl("one", "two\u2028three") + "\n" + jsonl("  "))
    (tmp_path / "a").mkdir()
    with gzip.open(tmp_path / "a" / "z.JSONL.gz", "wt") as file:
        file.write(jsonl("packed"))
    (tmp_path / "c.txt").write_bytes("\ufeffä\r\nb".encode())
    (tmp_path / "notes.md").write_text("not read")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "d.txt").write_text("not read")
    assert documents(tmp_path) == ["packed", "one", "two\u2028three", "ä\r\nb"]
    assert documents(str(tmp_path / "b.jsonl")) == ["one", "two\u2028three"]


def test_reads_parquet_and_zstandard(tmp_path):
    rows = ["one", " ", "two"]
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet")
    packed = pyarrow.compress(jsonl("three").encode(), codec="zstd", asbytes=True)
    (tmp_path / "b.jsonl.zst").write_bytes(packed)
    assert documents(tmp_path) == ["one", "two", "three"]


def test_text_is_read_beside_anything_else(tmp_path):
    """A record of a conversation that holds its text as well is a document here."""
    record = {"text": "all of it", "messages": [{"role": "user", "content": "hello"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    assert documents(tmp_path) == ["all of it"]


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x\\ud800y"}\n')
    assert documents(tmp_path / "a.jsonl") == ["x\ufffdy"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", jsonl("fine").encode() + b"{oops\n", "Line 2 of .*a.jsonl is not JSON"),
        ("a.jsonl", b'{"text": 3}\n', 'Line 1 of .* has a number as "text", where a string was'),
        ("a.jsonl", b'\n["text"]\n', 'Line 2 of .* has no string "text"'),
        ("a.jsonl", b'{"text": "\xff"}\n', "Line 1 of .* is not UTF-8"),
        ("a.txt", b"\xff", "^/.*a.txt is not UTF-8"),
        ("a.txt", b" \n", "holds no text"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"messages": []}\n', 'Line 1 of .* has no string "text".*keys messages'),
        ("a.docx", b"PK", r"not a kind of text file.*\.jsonl"),
        ("a.parquet", b"PAR1", "cannot be read"),
        ("a.jsonl.zst", b"not zstd", "cannot be read"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(jsonl("x" * 999).encode(), mtime=0)[:-20], "cannot be read"),
    ],
)
def test_refuses_a_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ShearlingError, match=message):
        documents(tmp_path / name)


def test_refuses_a_path_without_text(tmp_path):
    with pytest.raises(ShearlingError, match=r"There is no text at .*absent"):
        documents(tmp_path / "absent")
    with pytest.raises(ShearlingError, match=r"The directory .* holds no text"):
        documents(tmp_path)
