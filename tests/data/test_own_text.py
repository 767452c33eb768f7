"""Text that a model writes itself: what a plain loop draws, whatever interrupted it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import naive
from places import place
from shearling.cli import app
from shearling.data import own_text
from shearling.data.authors import ResidentAuthor
from shearling.data.documents import documents
from shearling.data.own_text import OwnText, OwnTextRun
from shearling.data.store import Store
from shearling.engine.sampling import PREFIX
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from tiny_tokenizer import BOS, CHAT, VOCAB, byte_tokenizer, write_llama

EOS = BOS + 1
LENGTH = 24


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("own") / "plain", layers=2, template=CHAT)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(
        tmp_path_factory.mktemp("own") / "opened", layers=2, template=CHAT, adds_bos=True
    )


def run(model: Path, output: Path, **options: Any) -> OwnTextRun:
    wanted = OwnText(**{"tokens": 7 * LENGTH, "length": LENGTH} | options)
    return OwnTextRun(Checkpoint.open(model), wanted, output, ResidentAuthor(place()))


def written(model: Path, output: Path, **options: Any) -> bytes:
    run(model, output, **options).write()
    return output.read_bytes()


def texts(content: bytes) -> list[str]:
    return [json.loads(line)["text"] for line in content.splitlines()]


def drawn(model: Path, begin: Sequence[int], at_T: Tensor) -> list[int]:
    """One token after the other, all of the text read anew for each of them."""
    ids = list(begin)
    for at in at_T.tolist():
        with torch.no_grad():
            logits_V = naive.stock(model)(input_ids=torch.tensor([ids]), use_cache=False).logits
        sums_V = logits_V[0, -1].double().softmax(-1).cumsum(-1)
        ids.append(int((sums_V < at).sum()))
    return ids


def said(ids: Sequence[int]) -> str:
    """What the byte tokenizer makes of tokens."""
    return str(byte_tokenizer().decode([n for n in ids if n < BOS]))


def test_a_plain_loop_writes_the_same(plain: Path, opened: Path, tmp_path: Path) -> None:
    """Behind BOS, and behind a token drawn by chance; an end begins another document."""
    for model in (plain, opened):
        found = texts(
            written(model, tmp_path / f"{model.name}.jsonl", tokens=3 * LENGTH, seed=3, batch=2)
        )
        expected = []
        for number in range(3):
            generator = torch.Generator().manual_seed(3 * 1_000_003 + number)
            begin = [BOS]
            if model == plain:
                whole = [n for n in range(BOS) if "\ufffd" not in byte_tokenizer().decode([n])]
                begin = [whole[int(torch.randint(len(whole), (1,), generator=generator))]]
            ids = drawn(model, begin, torch.rand(LENGTH - 1, generator=generator))
            assert len(ids) == LENGTH
            pieces: list[list[int]] = [[]]
            for token in ids:
                pieces.append([]) if token in (BOS, EOS) else pieces[-1].append(token)
            decoded = [said(piece) for piece in pieces]
            decoded[-1] = decoded[-1].rstrip("\ufffd")
            expected += [text for text in decoded if text.strip()]
        assert found == expected
        assert len(found) >= 3


def test_how_many_are_written_at_once_changes_nothing(plain: Path, tmp_path: Path) -> None:
    whole = written(plain, tmp_path / "a.jsonl")
    for batch in (1, 2, 5):
        assert written(plain, tmp_path / f"{batch}.jsonl", batch=batch) == whole
    assert written(plain, tmp_path / "other.jsonl", seed=1) != whole
    longer = written(plain, tmp_path / "more.jsonl", tokens=7 * LENGTH + 1)
    assert longer.startswith(whole)
    assert len(longer) > len(whole)


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, output = written(plain, tmp_path / "whole.jsonl", batch=2), tmp_path / "out.jsonl"
    for stop in (3 * LENGTH, 5 * LENGTH):  # in the second batch, and in the third

        def stopping(_: str, done: float, total: float, stop: int = stop) -> None:
            assert total == 7 * LENGTH
            if done > stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(plain, output, batch=2).write(stopping)
        assert not output.exists()
        assert run(plain, output).done == stop // LENGTH // 2 * 2
    kept = tmp_path / "out.jsonl.unfinished" / "00000000-00000002.jsonl"
    kept.write_text(json.dumps({"text": "kept"}) + "\n")  # what is there is not made again
    going_on = run(plain, output)  # its batches have the size they had
    assert going_on.begun.batch == 2
    # Stopped again, between putting the file together and tidying up.
    monkeypatch.setattr(own_text.shutil, "rmtree", lambda _: None)
    going_on.write()
    monkeypatch.undo()
    result = run(plain, output).write()
    assert list(tmp_path.glob("out.jsonl*")) == [output]
    first = len(texts(written(plain, tmp_path / "two.jsonl", tokens=2 * LENGTH)))
    assert texts(output.read_bytes()) == ["kept", *texts(whole)[first:]]
    assert result["documents"] == len(texts(output.read_bytes()))
    assert result["bytes"] == output.stat().st_size


def test_a_text_lends_beginnings(opened: Path, tmp_path: Path) -> None:
    source = tmp_path / "from.txt"
    source.write_text("The shepherd counts eleven sheep on the northern hill before rain. " * 3)
    found = texts(written(opened, tmp_path / "a.jsonl", begin_from=source, bos=True))
    begun = [text for text in found if text[:PREFIX] in source.read_text()]
    assert len(begun) >= 7, "of each sequence, the first document"
    assert len({text[:PREFIX] for text in begun}) > 3
    short = tmp_path / "short.txt"
    short.write_text("ab")
    with pytest.raises(ShearlingError, match="no document of the text"):
        run(opened, tmp_path / "b.jsonl", begin_from=short)


def test_a_template_opens_a_turn(plain: Path, opened: Path, tmp_path: Path) -> None:
    """A conversation is one document that keeps its marks, but for BOS."""
    for model in (plain, opened):
        found = texts(written(model, tmp_path / f"{model.name}.jsonl", template=True))
        assert len(found) == 7
        assert all(text.startswith("<user>") for text in found)
        assert any("<s>" in text or "</s>" in text for text in found)


def test_what_is_written_is_read_by_calibration_and_pack(opened: Path, tmp_path: Path) -> None:
    output = tmp_path / "own.jsonl"
    found = texts(written(opened, output, tokens=40 * LENGTH))
    assert documents(output) == found
    CliRunner().invoke(app, [
        "pack", str(output), "--tokenizer", str(opened), "--output", str(tmp_path / "store"),
        "--length", "16", "--workers", "1", "--held-out", "0.2",
    ], catch_exceptions=False)  # fmt: skip
    assert Store.open(tmp_path / "store").domains == ("own",)


def test_the_command(plain: Path, tmp_path: Path) -> None:
    output = tmp_path / "own.jsonl"
    arguments = ["write", str(plain), "--tokens", "100", "--length", "24", "--output", str(output)]

    def told(*more: str) -> dict[str, Any]:
        done = CliRunner().invoke(app, [*arguments, *more, "--json"], catch_exceptions=False)
        return json.loads(done.stdout)

    planned = told("--dry-run")
    assert not list(tmp_path.iterdir())
    assert (planned["sequences"], planned["tokens"], planned["done"]) == (5, 120, 0)
    done = told("--seed", "4", "--device", "cpu")
    assert (done["sequences"], done["tokens"], done["seed"]) == (5, 120, 4)
    assert done["documents"] == len(texts(output.read_bytes()))
    # A random model writes what no English text is, yet no special token and no half character.
    assert not any("<s>" in text or text.endswith("\ufffd") for text in texts(output.read_bytes()))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"length": 65}, "reads 64 tokens at most"),
    ({"length": 6, "template": True}, "sequences begin with 6 tokens; give more"),
]


@pytest.mark.parametrize(("options", "says"), REFUSED)
def test_what_cannot_be_written(
    plain: Path, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ShearlingError, match=says):
        run(plain, tmp_path / "own.jsonl", **options)
    assert not list(tmp_path.iterdir())


def test_outputs_that_are_taken(plain: Path, tmp_path: Path) -> None:
    output = tmp_path / "own.jsonl"
    checkpoint = Checkpoint.open(plain)
    with pytest.raises(ShearlingError, match="written as .jsonl"):
        run(plain, tmp_path / "own.txt")
    with pytest.raises(ShearlingError, match="not held in memory"):
        OwnTextRun(checkpoint, OwnText(tokens=9), output, ResidentAuthor(place(resident=False)))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(plain, output).write(stop)
    with pytest.raises(ShearlingError, match="begun with another length and seed"):
        run(plain, output, seed=5, length=25, tokens=7 * 25).write()
    run(plain, output).write()
    with pytest.raises(ShearlingError, match=r"own\.jsonl exists"):
        run(plain, output)


def test_no_template(tmp_path: Path) -> None:
    bare = write_llama(tmp_path / "bare", layers=1)
    with pytest.raises(ShearlingError, match="has no chat template"):
        run(bare, tmp_path / "own.jsonl", template=True)


def test_rows_of_padding_are_no_text(plain: Path) -> None:
    """Of 260 rows of the embedding, two are no token."""
    assert len(byte_tokenizer()) < VOCAB
    made: Callable[[list[int]], list[str]] = run(plain, Path("own.jsonl")).openings.documents
    assert made([72, VOCAB - 1, 73, EOS, 74]) == [said([72, 73]), said([74])]
