from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from shearling.commands.pack import pack
from shearling.data.store import Store
from shearling.errors import ShearlingError
from tiny_tokenizer import byte_tokenizer

APP = typer.Typer(pretty_exceptions_enable=False)
APP.command()(pack)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(APP, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds a tokenizer and no weights."""
    path = tmp_path_factory.mktemp("pack") / "tiny"
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.mkdir()
    lines = [json.dumps({"text": f"{i} sheep went by."}) for i in range(60)]
    (path / "a.jsonl").write_text("\n".join(lines))
    pairs = [json.dumps({"question": f"{i} and 1?", "answer": str(i + 1)}) for i in range(60)]
    (path / "b.jsonl").write_text("\n".join([*pairs, '{"text": ""}']))
    return path


def test_pack(tokenizer: Path, corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "store"
    common = ("--tokenizer", tokenizer, "--output", output, "--length", 16, "--held-out", 0.1)
    shown = run(corpus / "a.jsonl", f"sums={corpus / '[b]*'}", *common)
    assert shown.exit_code == 0, shown.output
    store = Store.open(output)
    assert store.domains == ("a", "sums")
    store.check_tokenizer(tokenizer)
    lines = shown.stdout.splitlines()
    found = store.manifest.to_json()["domains"]
    for line, domain in zip(lines[1:3], store.domains, strict=True):
        parts = [found[domain][part] for part in ("train", "held_out")]
        sequences = [part["sequences"] for part in parts]
        learned = sum(part["learned_tokens"] for part in parts)
        words = line.replace(",", "").replace(";", "").split()
        assert words[:5] == [domain, *map(str, [*sequences, 60, 16 * sum(sequences)])]
        assert (f" {learned:,} of them in answers; 1 blank" in line) == (domain == "sums")
    assert lines[-1] == f"wrote {output}"
    again = run(corpus / "a.jsonl", f"sums={corpus / '[b]*'}", *common, "--json", "--workers", 1)
    assert json.loads(again.stdout) == json.loads((output / "store.json").read_text())


def test_a_text_alone_is_packed_and_what_is_held_out_is_said(
    tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / "book.txt").write_text("a long book\n\n" * 2000)
    output = tmp_path / "s"
    shown = run(tmp_path / "book.txt", "--tokenizer", tokenizer, "--output", output)
    assert shown.exit_code == 0, shown.output
    assert "; held out: the last 2,048 tokens of its longest document" in shown.stdout


def test_dry_run(tokenizer: Path, corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "store"
    common = (corpus, "--tokenizer", tokenizer, "--output", output, "--dry-run")
    assert run(*common).stdout.startswith("would pack 2 files of 0.0 MB as text")
    found = json.loads(run(*common, "--json", "--length", 99).stdout)
    sizes = sum(file.stat().st_size for file in corpus.iterdir())
    assert found["domains"] == {"text": {"files": ["a.jsonl", "b.jsonl"], "bytes": sizes}}
    assert found["length"] == 99
    assert list(tmp_path.iterdir()) == [corpus]


def test_what_is_refused(tokenizer: Path, corpus: Path, tmp_path: Path) -> None:
    common = ("--tokenizer", tokenizer, "--output", tmp_path / "store")
    for arguments, expected in (
        ((tmp_path / "absent", *common), "absent"),
        ((corpus, f"text={corpus / 'a.jsonl'}", *common), "two domains are called 'text'"),
        ((corpus, "--tokenizer", tmp_path / "none", *common[2:]), "none is neither a directory"),
        ((corpus, "--tokenizer", corpus, *common[2:]), "tokenizer"),
    ):
        found = run(*arguments)
        assert isinstance(found.exception, ShearlingError), found.output
        assert expected in str(found.exception)
    for wrong in (("--length", 1), ("--held-out", 1), ("--workers", 0), ("--seed", -1)):
        assert run(corpus, *common, *wrong).exit_code == 2
    assert list(tmp_path.iterdir()) == [corpus]
