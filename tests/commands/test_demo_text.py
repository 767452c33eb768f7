import hashlib
import json
import os
import subprocess
import sys

import pytest

from shearling.commands import demo_text
from shearling.commands.demo_text import demo_documents, write_demo_text
from shearling.errors import ShearlingError


@pytest.fixture(scope="module")
def docstrings():
    """Parsing the standard library takes seconds, and gives the same each time."""
    return list(demo_text._docstrings())


@pytest.fixture(scope="module")
def documents(docstrings):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_text, "_docstrings", lambda: iter(docstrings))
        return demo_documents()


def paragraphs(documents):
    return [paragraph for text in documents for paragraph in text.split("\n\n")]


def test_enough_for_the_demo(documents):
    calibration, held_out = documents
    assert sum(map(len, held_out)) >= 30_000  # 12 windows of 512 tokens, at 4 characters a token
    assert sum(map(len, calibration)) >= 20 * 10 * 128 * 4  # 10 windows of 128 tokens, 20 times
    assert len(held_out) == (len(held_out) + len(calibration)) // 10


def test_no_paragraph_is_in_both_or_twice(documents):
    calibration, held_out = map(paragraphs, documents)
    everything = calibration + held_out
    assert len(everything) == len(set(everything))


def test_deterministic_and_nothing_parsed_is_imported(monkeypatch):
    """Another process, with another seed for hashes, gives the same text of every fifth module."""
    monkeypatch.setattr(demo_text, "MODULES", demo_text.MODULES[::5])
    program = (
        "import hashlib, inspect, json, sys\n"  # ast itself makes use of inspect
        "from shearling.commands import demo_text\n"
        "from shearling.commands.demo_text import MODULES, demo_documents\n"
        "demo_text.MODULES = MODULES[::5]\n"
        "before = set(sys.modules)\n"
        "digest = hashlib.sha256(json.dumps(demo_documents()).encode()).hexdigest()\n"
        "print(digest, *sorted((set(sys.modules) - before) & set(MODULES)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    digest = hashlib.sha256(json.dumps(demo_documents()).encode()).hexdigest()
    assert run.stdout.split() == [digest]


def test_reads_as_prose(documents):
    for paragraph in map(str, paragraphs(documents[0] + documents[1])):
        assert "\n" not in paragraph
        assert ">>>" not in paragraph
        assert "``" not in paragraph
        assert "  " not in paragraph


def test_without_topics(monkeypatch, docstrings):
    monkeypatch.setattr(demo_text, "_docstrings", lambda: iter(docstrings))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    _, held_out = demo_documents()
    assert sum(map(len, held_out)) >= 30_000


def test_without_any_source(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setattr(demo_text.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ShearlingError, match="only 0 documents were found"):
        demo_documents()


def test_markup_and_code_are_taken_off():
    text = (
        "Heading\n*******\n\n"
        "The *first* argument of :func:`~os.path.join` is **not** optional [1]_, whatever the\n"
        "``name`` of the platform-\nspecific module that `implements <link>`_ it may be::\n\n"
        "   join(a, b)[0] = {'c': 1}\n\n"
        "* An item of a list is a paragraph by itself, with its second line\n"
        "  belonging to it, as long as it has a sentence to tell.\n"
        "* Short.\n"
    )
    assert list(demo_text._paragraphs(text)) == [
        "The first argument of os.path.join is not optional, whatever the name of the "
        "platform-specific module that implements it may be:",
        "An item of a list is a paragraph by itself, with its second line belonging to it, as "
        "long as it has a sentence to tell.",
    ]


def test_write(tmp_path, documents, monkeypatch):
    monkeypatch.setattr(demo_text, "demo_documents", lambda: documents)
    paths = write_demo_text(tmp_path / "text")
    assert [path.name for path in paths] == ["calibration.jsonl", "held-out.jsonl"]
    for path, texts in zip(paths, documents, strict=True):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == [{"text": text} for text in texts]
    assert len(list((tmp_path / "text").iterdir())) == 2
