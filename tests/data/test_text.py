from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from shearling.data import text
from shearling.errors import ShearlingError

BOS, EOS = 256, 257


def byte_tokenizer(bos: bool = True, eos: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte; by default it puts BOS first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)} | {"<s>": BOS, "</s>": EOS}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>" if bos else None,
        eos_token="</s>" if eos else None,
        model_max_length=8,
    )


TOKENIZER = byte_tokenizer()


class Recording:
    """A tokenizer that remembers what it was given."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.eos_token_id, self.bos_token_id = EOS, BOS

    def __call__(self, given: str, **options: object) -> object:
        self.seen.append(given)
        return TOKENIZER(given, **options)  # ty: ignore


def calibration_windows(given, tokenizer, *, bos=False, **options) -> torch.Tensor:
    return text.calibration_windows(given, tokenizer, bos=bos, **options).ids_NS


def evaluation_windows(given, tokenizer, *, bos=False, **options) -> torch.Tensor:
    return text.evaluation_windows(given, tokenizer, bos=bos, **options).ids_NS


def ids_of(given: str) -> list[int]:
    return TOKENIZER(given, add_special_tokens=False)["input_ids"]


# calibration


def test_one_window_a_document_and_none_from_short_ones():
    given = ["short", *(letter * 40 for letter in "abcdef"), "tiny"]
    windows = calibration_windows(given, TOKENIZER, samples=6, length=30, seed=3)
    assert windows.dtype == torch.int64
    found = sorted(TOKENIZER.decode(row) for row in windows)
    assert found == [letter * 30 for letter in "abcdef"]


def test_a_window_may_begin_anywhere():
    found = set()
    for seed in range(60):
        row = calibration_windows(["abcdef"], TOKENIZER, samples=1, length=4, seed=seed)[0]
        found.add(TOKENIZER.decode(row))
    assert found == {"abcd", "bcde", "cdef"}


def test_a_seed_gives_one_result_and_another_seed_another():
    given = [f"document {i} " * 20 for i in range(20)]
    first, again, other = (
        calibration_windows(given, TOKENIZER, samples=5, length=40, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_only_as_many_documents_are_tokenised_as_needed():
    recording = Recording()
    calibration_windows(["word " * 50] * 100, recording, samples=4, length=8, seed=0)
    assert len(recording.seen) == 4


def test_of_a_long_document_a_part_is_tokenised():
    recording = Recording()
    long = "".join(map(str, range(100_000)))
    windows = calibration_windows([long] * 2, recording, samples=2, length=10, seed=0)
    assert all(len(part) == 10 * text.CHARACTERS_PER_TOKEN for part in recording.seen)
    assert all(str(TOKENIZER.decode(row)) in long for row in windows)


class OneTokenAWord:
    """A tokenizer of few tokens: a part of the text chosen by characters holds too few."""

    eos_token_id = None

    def __call__(self, given: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in given.split()]}


def test_a_part_with_too_few_tokens_grows_to_the_whole():
    sparse = " ".join(["x" * 400] * 20)
    windows = calibration_windows([sparse], OneTokenAWord(), samples=1, length=18, seed=0)
    assert windows.shape == (1, 18)
    windows = calibration_windows([sparse], OneTokenAWord(), samples=1, length=20, seed=0)
    assert windows.tolist() == [[400] * 20]


@pytest.mark.parametrize("eos", [True, False])
def test_short_documents_are_joined_and_cut(eos):
    tokenizer = byte_tokenizer(eos=eos)
    given = ["aaaaa", "bbbbb", "ccccc"]
    rng = np.random.default_rng(7)
    order = rng.permutation(3)
    joined: list[int] = []
    for i in order:
        joined += ([EOS] if eos and joined else []) + ids_of(given[i])
    cut = [joined[i : i + 6] for i in range(0, len(joined) - 5, 6)]
    windows = calibration_windows(given, tokenizer, samples=2, length=6, seed=7).tolist()
    assert len({tuple(row) for row in windows}) == 2
    assert all(row in cut for row in windows)


def test_joined_documents_beyond_the_limit_are_tokenised_in_part(monkeypatch):
    monkeypatch.setattr(text, "JOINED_CHARACTERS", 500)
    recording = Recording()
    long = "".join(map(str, range(10_000)))
    windows = calibration_windows([long], recording, samples=5, length=10, seed=1)
    assert len(recording.seen[-1]) == 5 * 10 * text.CHARACTERS_PER_TOKEN
    assert len({tuple(row.tolist()) for row in windows}) == 5
    assert all(str(TOKENIZER.decode(row)) in long for row in windows)


@given(
    given=st.lists(st.text("ab ", min_size=1, max_size=30), min_size=1, max_size=8),
    samples=st.integers(1, 4),
    length=st.integers(1, 20),
    seed=st.integers(0, 3),
)
def test_calibration_gives_all_it_was_asked_for_or_says_why_not(given, samples, length, seed):
    total = sum(map(len, given)) + len(given) - 1
    long_enough = sum(len(each) >= length for each in given)
    if long_enough < samples and total < samples * length:
        with pytest.raises(
            ShearlingError, match=f"has {total:,} tokens?.*needs? {samples * length}"
        ):
            calibration_windows(given, TOKENIZER, samples=samples, length=length, seed=seed)
        return
    windows = calibration_windows(given, TOKENIZER, samples=samples, length=length, seed=seed)
    assert windows.shape == (samples, length)


@pytest.mark.parametrize(("samples", "length", "name"), [(0, 4, "samples"), (4, 0, "length")])
def test_calibration_refuses_sizes_below_one(samples, length, name):
    with pytest.raises(ShearlingError, match=f"{name} is 0"):
        calibration_windows(["text"], TOKENIZER, samples=samples, length=length, seed=0)


# evaluation


def test_evaluation_windows_by_hand():
    windows = evaluation_windows(["abcd", "ef", "ghij"], TOKENIZER, window=4)
    assert [TOKENIZER.decode(row) for row in windows] == ["abcd", "\n\nef", "\n\ngh"]


def test_bos_comes_before_every_window():
    plain = evaluation_windows(["abcdefgh"], TOKENIZER, window=3)
    with_bos = evaluation_windows(["abcdefgh"], TOKENIZER, window=3, bos=True)
    assert with_bos.tolist() == [[BOS, *row] for row in plain.tolist()]


@given(
    given=st.lists(st.text("aé\n", min_size=1, max_size=40), min_size=1, max_size=6),
    window=st.integers(1, 9),
    limit=st.integers(1, 12),
    piece=st.integers(1, 15),
)
def test_first_windows_are_those_of_the_whole(given, window, limit, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "PIECE_CHARACTERS", piece)
        ids = ids_of("\n\n".join(given))  # one token a byte: the same however it is cut
        reference = [ids[i : i + window] for i in range(0, len(ids) - window + 1, window)]
        if not reference:
            with pytest.raises(ShearlingError, match=f"has {len(ids):,} tokens?"):
                evaluation_windows(given, TOKENIZER, window=window)
            return
        whole = evaluation_windows(given, TOKENIZER, window=window)
        first = evaluation_windows(given, TOKENIZER, window=window, max_windows=limit)
    assert whole.tolist() == reference
    assert first.tolist() == reference[:limit]


def test_no_more_is_tokenised_than_the_first_windows_take(monkeypatch):
    monkeypatch.setattr(text, "PIECE_CHARACTERS", 100)
    recording = Recording()
    long = ("x" * 39 + "\n") * 50
    windows = evaluation_windows([long, "never"], recording, window=10, max_windows=9)
    assert len(windows) == 9
    assert recording.seen == [long[:80], long[80:160]]  # at lines' ends


def test_evaluation_refuses():
    with pytest.raises(ShearlingError, match="The text has 4 tokens, but one window needs 5"):
        evaluation_windows(["abcd"], TOKENIZER, window=5)
    with pytest.raises(ShearlingError, match="window is 0"):
        evaluation_windows(["abcd"], TOKENIZER, window=0)
    with pytest.raises(ShearlingError, match="max_windows is 0"):
        evaluation_windows(["abcd"], TOKENIZER, window=2, max_windows=0)
    with pytest.raises(ShearlingError, match=re.escape("this tokenizer has none")):
        evaluation_windows(["abcd"], byte_tokenizer(bos=False), window=2, bos=True)


def test_no_complaint_about_length(caplog):
    evaluation_windows(["abcd" * 20], byte_tokenizer(), window=2)
    assert "longer than" not in caplog.text
