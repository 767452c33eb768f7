"""Where a text begins with BOS: in windows, in packed sequences, and in what must agree."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from shearling.data import merge, text
from shearling.data.bos import TokenWindows, opening
from shearling.data.pack import PackPlan, pack
from shearling.data.store import IGNORED, Store
from shearling.errors import ShearlingError
from tiny_tokenizer import BOS, byte_tokenizer

EOS = 257
PLAIN, ADDING = byte_tokenizer(), byte_tokenizer(adds_bos=True)


def ids_of(document: str) -> list[int]:
    return PLAIN(document)["input_ids"]


def test_it_is_the_tokenizers_to_say_unless_the_user_does() -> None:
    assert opening(PLAIN) is None
    assert opening(ADDING) == BOS
    assert opening(ADDING, False) is None
    assert opening(PLAIN, True) == BOS
    without = byte_tokenizer()
    without.bos_token = None  # ty: ignore
    assert opening(without) is None
    with pytest.raises(ShearlingError, match="this tokenizer has none"):
        opening(without, True)


@pytest.mark.parametrize("documents", [["a sheep in the fell " * 9] * 3, ["a", "pen", "bc"] * 40])
def test_calibration_windows_have_one_token_of_text_less(documents: list[str]) -> None:
    """The very windows of that many tokens, from long documents and from joined ones."""
    plain = text.calibration_windows(documents, PLAIN, samples=3, length=11, seed=5)
    opened = text.calibration_windows(documents, ADDING, samples=3, length=12, seed=5)
    assert (plain.bos, opened.bos) == (None, BOS)
    assert opened.ids_NS.tolist() == [[BOS, *row] for row in plain.ids_NS.tolist()]
    asked = text.calibration_windows(documents, PLAIN, samples=3, length=12, seed=5, bos=True)
    assert torch.equal(asked.ids_NS, opened.ids_NS)
    refused = text.calibration_windows(documents, ADDING, samples=3, length=11, seed=5, bos=False)
    assert torch.equal(refused.ids_NS, plain.ids_NS)


def test_a_window_of_bos_alone_is_refused() -> None:
    with pytest.raises(ShearlingError, match="length is 1, .* at least 2"):
        text.calibration_windows(["abc"], ADDING, samples=1, length=1, seed=0)


def test_evaluation_windows_hold_the_same_text() -> None:
    plain = text.evaluation_windows(["abcdefgh"], PLAIN, window=3)
    opened = text.evaluation_windows(["abcdefgh"], ADDING, window=3)
    assert (plain.bos, opened.bos, len(plain), len(opened)) == (None, BOS, 2, 2)
    assert opened.ids_NS.tolist() == [[BOS, *row] for row in plain.ids_NS.tolist()]


def test_windows_without_bos_are_as_they_are() -> None:
    ids_NT = torch.arange(6).view(2, 3)
    assert TokenWindows.of(ids_NT, None).ids_NS is ids_NT


def stored(root: Path, texts: list[str], *, length: int, bos: bool | None = None) -> Store:
    root.mkdir()
    file = root / "fell.jsonl"
    file.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    plan = PackPlan.of([str(file)], ADDING, "tiny", length=length, held_out=0, bos=bos)
    pack(plan, root / "store", workers=1, shard_bytes=150)
    return Store.open(root / "store")


def cut_naively(texts: list[str], length: int) -> list[list[int]]:
    """A token at a time: a sequence opens with BOS, and takes what comes until it is full."""
    stream = [token for one in texts for token in (BOS, *ids_of(one), EOS)]
    sequences, current = [], []
    for token in stream:
        if not current and token != BOS:
            current.append(BOS)
        current.append(token)
        if len(current) == length:
            sequences.append(current)
            current = []
    return sequences


@pytest.mark.parametrize("length", [2, 7, 24])
@pytest.mark.parametrize("chunk", [5, 8_000_000])
def test_packed_sequences(
    tmp_path: Path, length: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every sequence and every document begins with BOS, and none predicts it."""
    monkeypatch.setattr(merge, "CHUNK", chunk)
    draw = random.Random(length)
    texts = [
        "".join(draw.choices("aé b\n", k=draw.randint(1, 40))).strip() or "x" for _ in range(40)
    ]
    store = stored(tmp_path / "a", texts, length=length)
    sequences = store.sequences("fell")
    ids_NT, labels_NT = sequences[range(len(sequences))]
    expected = [row for row in cut_naively(texts, length) if any(t != BOS for t in row[1:])]
    assert ids_NT.tolist() == expected
    assert labels_NT.tolist() == [[IGNORED if t == BOS else t for t in row] for row in expected]
    assert store.bos == BOS
    told = store.manifest.to_json()["domains"]["fell"]["train"]
    assert told["learned_tokens"] == sum(t != BOS for row in expected for t in row)


def test_without_bos_the_bytes_of_a_store_are_what_they_were(tmp_path: Path) -> None:
    texts = ["a sheep", "in the fell", "and a pen"] * 5
    store = stored(tmp_path / "a", texts, length=8, bos=False)
    stream = [token for one in texts for token in (*ids_of(one), EOS)]
    whole = len(stream) // 8 * 8
    sequences = store.sequences("fell")
    ids_NT, labels_NT = sequences[range(len(sequences))]
    assert ids_NT.flatten().tolist() == stream[:whole]
    assert torch.equal(ids_NT, labels_NT)
    assert store.bos is None
    assert "bos" not in store.manifest.to_json()


def test_a_store_and_a_model_must_agree(tmp_path: Path) -> None:
    texts = ["a sheep in the fell"] * 9
    ADDING.save_pretrained(tmp_path / "model")
    opened = stored(tmp_path / "a", texts, length=8)
    plain = stored(tmp_path / "b", texts, length=8, bos=False)
    opened.check_tokenizer(tmp_path / "model")
    opened.check_tokenizer(tmp_path / "model", True)
    plain.check_tokenizer(tmp_path / "model", False)
    with pytest.raises(ShearlingError, match=r"a/store begin with the BOS token <s>, but --no-bos"):
        opened.check_tokenizer(tmp_path / "model", False)
    with pytest.raises(
        ShearlingError,
        match=r"b/store do not begin with the BOS token <s>, but the tokenizer of .*model puts <s>"
        r" before a text; pack the text anew with --bos, or give --no-bos",
    ):
        plain.check_tokenizer(tmp_path / "model")
    with pytest.raises(ShearlingError, match="--bos was given"):
        plain.check_tokenizer(tmp_path / "model", True)


def test_a_store_goes_on_only_as_it_was_begun(tmp_path: Path) -> None:
    store = stored(tmp_path / "a", ["a sheep in the fell"] * 9, length=8)
    plan = PackPlan.of(
        [str(tmp_path / "a" / "fell.jsonl")], ADDING, "tiny", length=8, held_out=0, bos=False
    )
    with pytest.raises(ShearlingError, match=rf"otherwise \(bos {BOS} there and None here\)"):
        pack(plan, store.path, workers=1)
