from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from shearling.data.store import Sequences, Store, load_tokenizer, tokenizer_hash
from shearling.errors import ShearlingError
from tiny_tokenizer import byte_tokenizer

LENGTH = 5
IDS = np.random.default_rng(0).integers(0, 60_000, (7, LENGTH))
LEARNED = np.random.default_rng(1).integers(0, 2, (7, LENGTH))


def write_store(path: Path, *, dtype: str = "uint16", masked: bool = True) -> Path:
    """A store by hand: domain "b" has 7 and 2 sequences, "a" 1 and none."""
    domains: dict[str, Any] = {}
    for domain, sizes in (("b", (7, 2)), ("a", (1, 0))):
        domains[domain] = {}
        for part, rows in zip(("train", "held_out"), sizes, strict=True):
            folder = path / domain / part
            folder.mkdir(parents=True)
            IDS[:rows].astype(f"<{'u2' if dtype == 'uint16' else 'u4'}").tofile(
                folder / "tokens.bin"
            )
            domains[domain][part] = {"sequences": rows}
            if masked and domain == "b":
                LEARNED[:rows].astype(np.uint8).tofile(folder / "mask.bin")
                domains[domain][part]["mask_sha256"] = "0"
    manifest = {
        "kind": "token-store", "version": 1, "length": LENGTH, "dtype": dtype, "domains": domains,
        "tokenizer": {"name": "tiny", "sha256": tokenizer_hash(byte_tokenizer())},
    }  # fmt: skip
    (path / "store.json").write_text(json.dumps(manifest))
    return path


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store.open(write_store(tmp_path_factory.mktemp("store") / "store"))


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("masked", [True, False])
def test_what_a_store_holds(tmp_path: Path, dtype: str, masked: bool) -> None:
    store = Store.open(write_store(tmp_path / "store", dtype=dtype, masked=masked))
    assert (store.length, store.domains) == (LENGTH, ("a", "b"))
    assert [len(store.sequences(d, p)) for d in "ab" for p in ("train", "held_out")] == [1, 0, 7, 2]
    ids, labels = store.sequences("b")[range(7)]
    assert (ids.dtype, labels.dtype) == (torch.int64, torch.int64)
    assert ids.tolist() == IDS.tolist()
    expected = [
        [i if learned or not masked else -100 for i, learned in zip(row, mask, strict=True)]
        for row, mask in zip(IDS.tolist(), LEARNED, strict=True)
    ]
    assert labels.tolist() == expected
    ids, labels = store.sequences("a")[[0]]
    assert ids.tolist() == labels.tolist() == IDS[:1].tolist()
    labels[:] = 0  # is not the same memory, nor the file's
    assert ids.tolist() == store.sequences("a")[[0]][0].tolist() == IDS[:1].tolist()


@given(rows=st.lists(st.integers(0, 6), max_size=9))
def test_rows_in_any_order(store: Store, rows: list[int]) -> None:
    sequences = store.sequences("b")
    ids, labels = sequences[rows]
    assert ids.shape == labels.shape == (len(rows), LENGTH)
    assert ids.tolist() == [IDS[row].tolist() for row in rows]
    for given_as in (tuple(rows), np.array(rows, dtype=np.int32), torch.tensor(rows).long()):
        assert torch.equal(sequences[given_as][1], labels)


@pytest.mark.parametrize("rows", [[7], [0, -1], [10**9]])
def test_rows_that_are_not_there(store: Store, rows: list[int]) -> None:
    with pytest.raises(IndexError, match="of 7"):
        store.sequences("b")[rows]
    with pytest.raises(IndexError):
        store.sequences("a", "held_out")[[0]]


def test_an_empty_part(store: Store) -> None:
    ids, labels = store.sequences("a", "held_out")[[]]
    assert ids.shape == labels.shape == (0, LENGTH)


def test_sequences_go_to_another_process_as_paths(store: Store) -> None:
    sequences = store.sequences("b")
    unused = pickle.dumps(sequences)
    expected = sequences[[3]]
    sent = pickle.dumps(sequences)
    assert sent == unused  # and not what was mapped since
    again: Sequences = pickle.loads(sent)
    assert again == sequences
    assert all(map(torch.equal, again[[3]], expected))


def test_domains_and_parts_that_are_not_there(store: Store) -> None:
    with pytest.raises(ShearlingError, match="no domain 'c'; it has a, b"):
        store.sequences("c")
    with pytest.raises(ShearlingError, match="train or held_out, not 'test'"):
        store.sequences("a", "test")


def refusal(path: Path) -> str:
    with pytest.raises(ShearlingError) as error:
        Store.open(path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_stores_that_cannot_be_opened(tmp_path: Path) -> None:
    assert "There is no token store" in refusal(tmp_path / "absent")
    assert "is no token store" in refusal(tmp_path)
    (tmp_path / ".unfinished").mkdir()
    assert "still being written" in refusal(tmp_path)
    (tmp_path / "store.json").write_text("{")
    assert "JSON" in refusal(tmp_path)
    (tmp_path / "store.json").write_text('{"kind": "scores"}')
    assert "is no token store" in refusal(tmp_path)
    (tmp_path / "store.json").write_text('{"kind": "token-store", "version": 2}')
    assert "version 2" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name", ["b/train/tokens.bin", "b/held_out/mask.bin", "a/train/tokens.bin"]
)
def test_files_that_were_cut_off(tmp_path: Path, name: str) -> None:
    path = write_store(tmp_path / "store")
    whole = (path / name).read_bytes()
    (path / name).write_bytes(whole[:-1])
    assert f"{name} has {len(whole) - 1} bytes, where {len(whole)} bytes" in refusal(path)
    (path / name).unlink()
    assert f"{name} is missing" in refusal(path)


def test_the_tokenizer_must_be_the_same(store: Store, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "same")
    store.check_tokenizer(tmp_path / "same")
    tokenizer.add_tokens("sheep")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ShearlingError, match=r"tokenizer of tiny .*other differs"):
        store.check_tokenizer(tmp_path / "other")
    (tmp_path / "none").mkdir()
    with pytest.raises(ShearlingError, match="none"):
        store.check_tokenizer(tmp_path / "none")


def test_a_tokenizer_keeps_its_hash(tmp_path: Path) -> None:
    """Through saving and loading, use and pickling; not through a change of what it does."""
    expected = tokenizer_hash(byte_tokenizer())
    assert len(expected) == 64
    tokenizer: Any = byte_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    for step in range(2):
        tokenizer.save_pretrained(tmp_path / str(step))
        assert tokenizer_hash(tmp_path / str(step)) == expected
        tokenizer = load_tokenizer(tmp_path / str(step))
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["a", "sheep"], padding="max_length", truncation=True, max_length=9)
    assert tokenizer_hash(tokenizer) == expected
    assert tokenizer_hash(pickle.loads(pickle.dumps(tokenizer))) == expected

    changed = [byte_tokenizer() for _ in range(3)]
    changed[0].eos_token = "<s>"
    changed[1].add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    changed[2].backend_tokenizer.pre_tokenizer = None
    assert len({expected, *map(tokenizer_hash, changed)}) == 4


def test_an_empty_prefix_is_none() -> None:
    """As versions of transformers write the tokenizer of one GGUF file."""

    def with_prefix(prefix: str | None) -> str:
        written = json.loads(Tokenizer(models.BPE({"a": 0, "b": 1}, [])).to_str())
        written["model"]["continuing_subword_prefix"] = prefix
        backend = Tokenizer.from_str(json.dumps(written))
        return tokenizer_hash(PreTrainedTokenizerFast(tokenizer_object=backend))

    assert with_prefix("") == with_prefix(None) != with_prefix("##")
