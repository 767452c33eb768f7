"""What words are worth to a text, counted here with a tokenizer that lacks them."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.plan import Spending
from shearling.pruning.prune import CalibrationText, Pruning, Running
from shearling.pruning.size import Size
from shearling.pruning.vocabulary import choose_tokens, price
from shearling.pruning.vocabulary.price import (
    VocabularyPrice,
    begin_with_words,
    hint,
    vocabulary_share,
)
from shearling.table.values import Shape

TRAINED = [
    f"{word} {other} {word}ing {other}ed the un{word} re{other} ly{word}{other}"
    for word in ("shear", "graze", "flock", "herd", "fleece", "meadow", "barn")
    for other in ("walk", "spin", "weave", "card", "comb", "count")
]
USED = [text for text in TRAINED if text.startswith(("shear", "graze"))]


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny model most of whose parameters are words."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    raw.train_from_iterator(TRAINED, trainer)
    path = tmp_path_factory.mktemp("wordy") / "model"
    config = LlamaConfig(
        vocab_size=raw.get_vocab_size() + 3, hidden_size=8, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4, intermediate_size=16,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(path)
    return Checkpoint.open(path)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "used.jsonl"
    file.write_text("".join(json.dumps({"text": one}) + "\n" for one in USED * 6))
    return file


def within(source: Checkpoint, most: int, shape: Shape) -> bool:
    return source.layout.count(shape) <= most


def counted(source: Checkpoint) -> Counter[int]:
    tokenizer = source.tokenizer()
    return Counter(token for one in USED for token in tokenizer(one)["input_ids"])


def test_what_no_text_needs_is_what_the_choice_drops(wordy: Checkpoint) -> None:
    priced = VocabularyPrice.of(wordy.path, lambda: USED)
    assert priced.fewest == len(choose_tokens(wordy.path, USED)) < priced.tokens
    assert priced.tokens - priced.unused == priced.fewest  # none that occurs is worth so little
    counts = counted(wordy)
    assert priced.occurrences == counts.total()
    assert priced.unseen == sum(n == 1 for n in counts.values()) / counts.total()
    assert priced.share_lost(priced.fewest) == 0


def test_a_word_that_next_to_never_occurs_is_cheap(
    wordy: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One word among some: it is cheap as soon as a token more is."""
    vocab, text = wordy.tokenizer().get_vocab(), ["shear" * 50]
    rare = next(word for word in ("meadow", "barn", "herd", "fleece") if word in vocab)
    dear = VocabularyPrice.of(wordy.path, lambda: [*text, rare])
    monkeypatch.setattr(price, "CHEAP", 1.5 / dear.occurrences)
    cheap = VocabularyPrice.of(wordy.path, lambda: [*text, rare])
    assert cheap.fewest < dear.fewest
    assert cheap.unused == dear.unused
    assert dear.share_lost(dear.fewest) == 0
    assert cheap.share_lost(cheap.fewest) == pytest.approx(1 / cheap.occurrences)


def test_the_share_of_words_is_that_of_the_stored_rows(wordy: Checkpoint, models) -> None:
    rows = wordy.shape["vocab"] * 8
    assert vocabulary_share(wordy) == rows / wordy.parameters
    untied = Checkpoint.open(models("llama"))
    stored = sum(
        tensor.numel()
        for name, tensor in untied.read(["model.embed_tokens.weight", "lm_head.weight"])
    )
    assert vocabulary_share(untied) == stored / untied.parameters


def test_words_go_as_far_as_it_takes_and_no_further(wordy: Checkpoint) -> None:
    spending, count = Spending(axes=("layers", "vocab")), wordy.layout.count
    priced = VocabularyPrice.of(wordy.path, lambda: USED)
    for wanted in (priced.tokens - 7, priced.fewest):
        most = count(wordy.shape.with_(vocab=wanted))
        start, words = begin_with_words(wordy, spending, lambda: USED, partial(within, wordy, most))
        assert start == wordy.shape.with_(vocab=wanted)
        assert words["kept"] == wanted
    start, _ = begin_with_words(wordy, spending, lambda: USED, lambda s: False)
    assert start["vocab"] == priced.fewest
    assert begin_with_words(wordy, Spending(), None, lambda s: False) == (wordy.shape, {})
    with pytest.raises(ShearlingError, match="--axes vocab.*--calibration"):
        begin_with_words(wordy, spending, None, lambda s: False)


def pruning(source: Checkpoint, size: Size, text: Path | None, told: list[str]) -> Pruning:
    calibration = None if text is None else CalibrationText(file=text, samples=8, length=16)
    running = Running(notify=told.append)
    return Pruning.of(source, size, calibration=calibration, running=running)


def test_a_budget_takes_words_only_when_asked(wordy: Checkpoint, text: Path) -> None:
    told: list[str] = []
    fewest = VocabularyPrice.of(wordy.path, lambda: USED).fewest
    most = wordy.layout.count(wordy.shape.with_(vocab=fewest + 5))
    plain = pruning(wordy, Size(params=most), text, told).wanted
    assert plain.after["vocab"] == wordy.shape["vocab"]
    assert plain.account == {}
    (said,) = [one for one in told if "vocabulary is" in one]
    assert f"{vocabulary_share(wordy):.0%} of the {wordy.parameters:,} parameters" in said
    assert "--axes layers,mlp,vocab" in said

    told.clear()
    asked = pruning(wordy, Size(params=most, axes="layers,mlp,vocab"), text, told).wanted
    assert asked.after == wordy.shape.with_(vocab=fewest + 5)
    assert asked.account["vocabulary"]["kept"] == fewest + 5
    assert not any("vocabulary is" in one for one in told)

    least = wordy.layout.count(wordy.shape.with_(vocab=fewest, layers=2))
    less = pruning(wordy, Size(params=least, axes="layers,mlp,vocab"), text, told).wanted
    assert less.after["vocab"] == fewest
    assert less.after["layers"] < 3 or less.after["mlp"] < 16
    assert wordy.layout.count(less.after) <= least


def test_the_hint_without_text_or_words(wordy: Checkpoint, models) -> None:
    assert "--calibration FILE" in str(hint(wordy, None))
    assert hint(Checkpoint.open(models("llama")), None) is None  # it has no tokenizer


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ({"axes": "layers,hidden"}, "names 'hidden', but a budget takes from layers, mlp, vocab"),
        ({"prefer": "size"}, "one of quality, balanced, speed"),
    ],
)
def test_what_is_no_axis_or_preference(wordy: Checkpoint, size: dict, said: str) -> None:
    with pytest.raises(ShearlingError, match=said):
        pruning(wordy, Size(params="0.85x", **size), None, [])


def test_sizes_that_are_named_leave_nothing_to_prefer(wordy: Checkpoint) -> None:
    told: list[str] = []
    pruning(wordy, Size(layers=2, prefer="speed"), None, told)
    assert any("--prefer ignored: the sizes are named" in one for one in told)
