"""The vocabulary axis: what is kept is closed, and any text still comes back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from shearling.errors import ShearlingError
from shearling.pruning.vocabulary import (
    choose_tokens,
    prove_round_trip,
    renumber_ids,
    rewrite,
    rewrite_tokenizer,
)
from tiny_tokenizer import NAMES, SPECIAL, TEXT, byte_level

SMALL = TEXT[:1]  # what a cut is made for; the rest is what it has not seen
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
KINDS = ("byte-level", "sentencepiece", "unigram", "characters")


def sentencepiece() -> Tokenizer:
    """As Llama's: bytes stand for unknown characters, and every split of a piece is a merge."""
    draft = Tokenizer(models.BPE())
    draft.normalizer = LLAMA_NORMALIZER
    draft.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    draft.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    learnt = json.loads(draft.to_str())["model"]
    pieces = ["".join(pair) for pair in learnt["merges"]]
    characters = [token for token in learnt["vocab"] if len(token) == 1]
    vocab = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *characters]
    known = {token: i for i, token in enumerate(dict.fromkeys(vocab))}
    merges = [
        (piece[:i], piece[i:])
        for piece in dict.fromkeys(pieces)
        for i in range(1, len(piece))
        if piece[:i] in known and piece[i:] in known
    ]
    raw = Tokenizer(
        models.BPE(vocab=known, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    raw.normalizer = LLAMA_NORMALIZER
    raw.decoder = LLAMA_DECODER
    raw.add_special_tokens(SPECIAL)
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return raw


LLAMA_NORMALIZER = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
LLAMA_DECODER = decoders.Sequence(
    [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(content=" ", left=1),
    ]
)


def unigram() -> Tokenizer:
    draft = Tokenizer(models.Unigram())
    draft.pre_tokenizer = pre_tokenizers.Metaspace()
    draft.train_from_iterator(
        TEXT,
        trainers.UnigramTrainer(
            vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        ),
    )
    learnt = [tuple(entry) for entry in json.loads(draft.to_str())["model"]["vocab"]]
    bytes_ = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    raw = Tokenizer(models.Unigram([*learnt[:3], *bytes_, *learnt[3:]], 0, byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = LLAMA_DECODER
    raw.add_special_tokens(SPECIAL)
    raw.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 1))
    return raw


def characters() -> Tokenizer:
    """BPE on characters, unknown ones to <unk>: nothing stands for a character but itself."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    raw.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False)
    )
    return raw


def save(raw: Tokenizer, path: Path, **config: Any) -> Path:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **NAMES)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    rows = raw.get_vocab_size() + 5  # the embedding is padded
    defaults = {"vocab_size": rows, "bos_token_id": 1, "eos_token_id": [2]}
    (path / "config.json").write_text(json.dumps(defaults | config))
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    made = (byte_level, sentencepiece, unigram, characters)
    found = {kind: save(make(), root / kind) for kind, make in zip(KINDS, made, strict=True)}
    # As older files have it: merges in one string, other forms of the vocabulary beside.
    edit(found["sentencepiece"] / "tokenizer.json", merges_in_one_string)
    raw = Tokenizer.from_file(str(found["byte-level"] / "tokenizer.json"))
    raw.model.save(str(found["byte-level"]))
    tool = {"<tool>": raw.get_vocab_size() - 1}
    (found["byte-level"] / "added_tokens.json").write_text(json.dumps(tool))
    (found["byte-level"] / "special_tokens_map.json").write_text(json.dumps(NAMES))
    return found


def merges_in_one_string(raw: dict[str, Any]) -> None:
    raw["model"]["merges"] = [" ".join(pair) for pair in raw["model"]["merges"]]


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def load(path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(path / "tokenizer.json"))


def cut(source: Path, kept: tuple[int, ...], target: Path) -> Path:
    target.mkdir()
    shutil.copyfile(source / "chat_template.jinja", target / "chat_template.jinja")
    rewrite_tokenizer(source, kept, target)
    return target


def tokens(path: Path) -> dict[str, int]:
    vocab = json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
    return vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def smallest(source: Path) -> int:
    with pytest.raises(ShearlingError, match=r"ask for \d+ to \d+") as refused:
        choose_tokens(source, SMALL, 0)
    return int(str(refused.value).rsplit("ask for ", 1)[1].split()[0])


@pytest.fixture(scope="module")
def pairs(
    sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], tuple[Path, Path, tuple[int, ...]]]:
    """Each kind cut to what a small text uses, and to the least there can be."""
    root = tmp_path_factory.mktemp("cut")
    found = {}
    for kind, source in sources.items():
        for name, size in (("used", None), ("least", smallest(source))):
            kept = choose_tokens(source, SMALL, size)
            found[kind, name] = source, cut(source, kept, root / f"{kind}-{name}"), kept
    return found


@pytest.mark.parametrize("size", ["used", "least"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_text_comes_back(pairs, kind: str, size: str) -> None:
    source, target, _ = pairs[kind, size]
    before, after = load(source), load(target)

    @settings(max_examples=60, deadline=None)
    @given(st.text() | st.text("the shpr▁é—<>0xA\n🐑日"))
    def check(text: str) -> None:
        expected = before.decode(before.encode(text).ids, skip_special_tokens=False)
        assert after.decode(after.encode(text).ids, skip_special_tokens=False) == expected

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_text_whose_tokens_are_all_kept_is_segmented_as_before(pairs, kind: str) -> None:
    source, target, kept = pairs[kind, "used"]
    before, after = load(source), load(target)
    old = before.encode(SMALL[0]).ids
    assert after.encode(SMALL[0]).ids == [kept.index(i) for i in old]
    assert len(kept) < before.get_vocab_size()
    assert len(after.encode(TEXT[1]).ids) > len(before.encode(TEXT[1]).ids)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "characters"])
@pytest.mark.parametrize("extra", [0, 7, 19])
def test_every_kept_token_can_still_be_merged(sources, kind: str, extra: int, tmp_path) -> None:
    source = sources[kind]
    size = smallest(source) + extra
    kept = choose_tokens(source, SMALL, size)
    assert len(kept) == size
    assert list(kept) == sorted(set(kept))
    before = models_only(load(source))
    after = models_only(load(cut(source, kept, tmp_path / "cut")))
    for new, old in enumerate(kept):
        text = before.id_to_token(old)
        assert after.id_to_token(new) == text
        if [token.id for token in before.model.tokenize(text)] == [old]:  # reachable at all
            assert [token.id for token in after.model.tokenize(text)] == [new]


def models_only(raw: Tokenizer) -> Tokenizer:
    raw.normalizer = raw.pre_tokenizer = None
    return raw


@pytest.mark.parametrize("kind", KINDS)
def test_all_kept_changes_nothing_and_no_source_is_written_to(sources, kind: str, tmp_path) -> None:
    source = sources[kind]
    before = contents(source)
    count = load(source).get_vocab_size()
    everything = choose_tokens(source, SMALL, count)
    assert everything == tuple(range(count))
    written = contents(cut(source, everything, tmp_path / "cut"))
    assert {"tokenizer.json", "tokenizer_config.json"} <= written.keys()
    if kind == "byte-level":
        assert {"vocab.json", "merges.txt", "added_tokens.json"} <= written.keys()
    for name, data in written.items():
        if name.endswith(".json"):
            assert json.loads(data) == json.loads(before[name]), name
        else:
            assert data == before[name], name
    prove_round_trip(source, tmp_path / "cut", TEXT)
    assert contents(source) == before


def test_special_and_named_tokens_stay_and_padding_goes(sources, tmp_path) -> None:
    source = shutil.copytree(sources["byte-level"], tmp_path / "source")
    count = load(source).get_vocab_size()
    unused = [i for i in range(300, 320) if i not in choose_tokens(source, SMALL)]
    config, generation = source / "config.json", source / "generation_config.json"
    kept = choose_tokens(source, SMALL)
    assert {0, 1, 2, count - 1} <= set(kept)
    assert max(kept) < count
    edit(config, lambda c: c.update(text_config={"eos_token_id": [2, unused[0]]}))
    generation.write_text(json.dumps({"pad_token_id": unused[1], "stop_token_ids": [count + 2]}))
    edit(source / "tokenizer.json", lambda t: t.update(padding=padding(unused[2])))
    more = choose_tokens(source, SMALL)
    assert {*unused[:3], count + 2} <= set(more)
    cut(source, more, tmp_path / "cut")
    written = json.loads((tmp_path / "cut" / "tokenizer.json").read_text())
    assert written["padding"] == padding(more.index(unused[2]))
    edit(config, lambda c: c.update(vocab_size=count - 1))  # <tool> has no row, as in Gemma 3
    generation.unlink()
    fewer = choose_tokens(source, SMALL)
    assert count - 1 not in fewer
    cut(source, fewer, tmp_path / "fewer")
    assert load(tmp_path / "fewer").token_to_id("<tool>") is None


def padding(pad_id: int) -> dict[str, Any]:
    return {
        "strategy": "BatchLongest",
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": pad_id,
        "pad_type_id": 0,
        "pad_token": "</s>",
    }


def test_ids_follow_in_every_file(pairs) -> None:
    source, target, kept = pairs["byte-level", "used"]
    new = tokens(target)
    assert new == {t: kept.index(i) for t, i in tokens(source).items() if i in kept}
    written = json.loads((target / "tokenizer.json").read_text())
    assert [(t["content"], t["id"]) for t in written["added_tokens"]] == [
        *zip(SPECIAL, range(3), strict=True),
        ("<tool>", len(kept) - 1),
    ]
    assert json.loads((target / "vocab.json").read_text()) == new
    merges = (target / "merges.txt").read_text().splitlines()
    assert merges[0].startswith("#version")
    assert [line.split(" ") for line in merges[1:]] == written["model"]["merges"]
    assert (
        0
        < len(merges) - 1
        < len(json.loads((source / "tokenizer.json").read_text())["model"]["merges"])
    )
    assert json.loads((target / "added_tokens.json").read_text()) == {"<tool>": len(kept) - 1}
    assert json.loads((target / "special_tokens_map.json").read_text()) == NAMES


def test_processors_and_the_configuration_of_the_tokenizer(sources, tmp_path) -> None:
    source = shutil.copytree(sources["byte-level"], tmp_path / "source")
    vocab = tokens(source)
    high = sorted(vocab.values())[-5:]
    text = {i: token for token, i in vocab.items()}
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "x", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"x": {"id": "x", "ids": [high[0], high[1]], "tokens": ["x", "y"]}},
    }
    bert = {
        "type": "BertProcessing",
        "sep": [text[high[2]], high[2]],
        "cls": [text[high[3]], high[3]],
    }
    both = {"type": "Sequence", "processors": [template, bert]}
    edit(source / "tokenizer.json", lambda raw: raw.update(post_processor=both))
    edit(
        source / "tokenizer_config.json", lambda c: c.update(added_tokens_decoder=decoder(high[4]))
    )
    kept = choose_tokens(source, SMALL)
    assert set(high) <= set(kept)
    moved = [kept.index(old) for old in high]
    assert moved != high
    target = cut(source, kept, tmp_path / "cut")
    one, two = json.loads((target / "tokenizer.json").read_text())["post_processor"]["processors"]
    assert one == template | {
        "special_tokens": {"x": {"id": "x", "ids": moved[:2], "tokens": ["x", "y"]}}
    }
    assert two == bert | {"sep": [text[high[2]], moved[2]], "cls": [text[high[3]], moved[3]]}
    config = json.loads((target / "tokenizer_config.json").read_text())
    assert config["added_tokens_decoder"] == decoder(moved[4])


def decoder(token: int) -> dict[str, Any]:
    return {str(token): {"content": "</s>", "special": True}}


def by_hand(path: Path, merges: str, **model: Any) -> Path:
    """Merges as in "ab abc": each makes its token out of all but the last letter and the last."""
    pairs = [(word[:-1], word[-1]) for word in merges.split()]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {
        t: i for i, t in enumerate([*SPECIAL, *alphabet, *merges.split(), *model.pop("more", [])])
    }
    raw = Tokenizer(models.BPE(vocab=vocab, merges=pairs, **model))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return save(raw, path)


def words(source: Path, documents: list[str], size: int | None) -> set[str]:
    names = {i: token for token, i in tokens(source).items()}
    return {names[i] for i in choose_tokens(source, documents, size) if i >= 259}


def test_a_dropped_token_passes_its_count_to_its_ingredients(tmp_path) -> None:
    source = by_hand(tmp_path, "ab de abc")
    text = ["ab " * 5 + "abc " * 3 + "de " * 6]
    assert words(source, text, 262) == {"ab", "de", "abc"}
    assert words(source, text, 261) == {"ab", "de"}
    assert words(source, text, 260) == {"ab"}  # 5 + 3 against 6
    assert words(source, text, 259) == set()


def test_ingredients_stay_though_no_text_shows_them(tmp_path) -> None:
    source = by_hand(tmp_path, "ab abc abcd xy xyz")
    assert words(source, ["abcd"], None) == {"ab", "abc", "abcd"}
    assert words(source, ["abcd"], 262) == {"ab", "abc", "abcd"}
    # What the corpus does not use fills the size up, first merged first.
    assert words(source, ["abcd"], 263) == {"ab", "abc", "abcd", "xy"}
    assert words(source, ["xyz abc"], None) == {"ab", "abc", "xy", "xyz"}


def test_whole_words_looked_up_without_merges(tmp_path) -> None:
    """As in Llama 3: a word in the vocabulary is taken whole, merges or not."""
    source = by_hand(tmp_path / "source", "ab cd", ignore_merges=True, more=["abcd", "cdab"])
    assert words(source, ["abcd ab"], None) == {"ab", "cd", "abcd"}
    assert words(source, ["abcd cd"], 260) == {"cd"}
    kept = choose_tokens(source, ["abcd"])
    after = load(cut(source, kept, tmp_path / "cut"))
    assert after.encode("abcd").tokens == ["abcd"]
    assert after.encode("cdab").tokens == ["cd", "ab"]


def test_the_unknown_piece_of_unigram_follows(tmp_path) -> None:
    pieces = [(piece, -1.0) for piece in ("a", "x", "y", "aa", "<unk>")]
    source = save(Tokenizer(models.Unigram(pieces, 4)), tmp_path / "source")
    target = cut(source, choose_tokens(source, ["a"]), tmp_path / "cut")
    assert load(source).encode("aaz").ids == [3, 4]
    assert load(target).encode("aaz").ids == [0, 0, 3]


def test_ids_left_to_the_model_class_stay(tmp_path) -> None:
    source = by_hand(tmp_path, "ab cd")
    ids = tokens(source)
    defaults = {"model_type": "phi3", "vocab_size": 40_000}  # whose class takes 32000 for EOS
    (source / "config.json").write_text(json.dumps(defaults))
    assert 32_000 in choose_tokens(source, ["ab"])
    assert ids["cd"] not in choose_tokens(source, ["ab"])


def test_a_token_costs_what_its_text_is_spelt_with(tmp_path) -> None:
    source = by_hand(tmp_path, "xy", ignore_merges=True, more=["abcdef"])
    assert words(source, ["abcdef"] * 2 + ["xy"] * 5, 260) == {"abcdef"}  # 2 * 5 against 5


def test_a_special_token_that_transformers_adds_stays(sources, tmp_path) -> None:
    source = shutil.copytree(sources["characters"], tmp_path / "source")
    edit(source / "tokenizer_config.json", lambda c: c.update(pad_token="<pad>"))
    kept = choose_tokens(source, SMALL)
    assert kept[-1] == load(source).get_vocab_size()
    target = cut(source, kept, tmp_path / "cut")
    tokenizer: Any = AutoTokenizer.from_pretrained(target)
    assert tokenizer.pad_token_id == len(kept) - 1


def test_the_sign_for_a_space_stays_though_no_setting_shows_it(sources, tmp_path) -> None:
    """Llama's class in transformers puts it in, whatever tokenizer.json says."""
    source = shutil.copytree(sources["sentencepiece"], tmp_path / "source")
    edit(source / "tokenizer.json", lambda raw: raw.update(normalizer=None, decoder=None))
    assert tokens(source)["▁"] in choose_tokens(source, ["x"])


def test_of_several_merges_that_make_a_token_the_one_that_does_counts(tmp_path) -> None:
    raw = load(by_hand(tmp_path / "draft", "bc ab abc"))
    model = json.loads(raw.to_str())["model"]
    model["merges"] = [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")]
    raw.model = models.BPE(vocab=model["vocab"], merges=model["merges"])
    source = save(raw, tmp_path / "source")
    assert words(source, ["abc"], None) == {"bc", "abc"}  # ab never arises: b and c merge first


def test_of_unigram_pieces_the_rarest_go_first(tmp_path) -> None:
    entries = [("<unk>", 0.0), ("a", -4.0), ("b", -4.0), ("ab", -3.0), ("aab", -5.0), ("bb", -3.5)]
    raw = Tokenizer(models.Unigram(entries, 0))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    source = save(raw, tmp_path)
    names = {i: piece for i, (piece, _) in enumerate(entries)}

    def chosen(size: int | None, text: str = "ab " * 3 + "aab " * 2 + "bb " * 4) -> set[str]:
        kept = choose_tokens(source, [text], size)
        return {names[i] for i in kept if 3 <= i < len(names)}

    count = load(source).get_vocab_size()
    assert chosen(None) == {"ab", "aab", "bb"}
    assert chosen(None, "aab") == {"aab"}  # which no other piece is merged into
    assert chosen(count - 1) == {"ab", "bb"}
    assert chosen(count - 2) == {"ab"}  # 3 and the 2 of aab, against 4
    assert chosen(count - 3) == set()


@pytest.mark.parametrize(
    ("kind", "tokenizer_class"),
    [("byte-level", "GPT2Tokenizer"), ("sentencepiece", "LlamaTokenizer")],
)
def test_tokenizers_that_transformers_builds_anew(
    sources, kind: str, tokenizer_class: str, tmp_path
) -> None:
    source = shutil.copytree(sources[kind], tmp_path / "source")
    edit(source / "tokenizer_config.json", lambda c: c.update(tokenizer_class=tokenizer_class))
    target = cut(source, choose_tokens(source, SMALL), tmp_path / "cut")
    proof = prove_round_trip(source, target, SMALL)
    assert proof["tokens_before"] == proof["tokens_after"]
    assert prove_round_trip(source, target, TEXT)["ratio"] > 1


def test_the_proof_counts(pairs) -> None:
    source, target, _ = pairs["byte-level", "used"]
    before = sum(len(load(source).encode(text).ids) for text in TEXT)
    after = sum(len(load(target).encode(text).ids) for text in TEXT)
    assert prove_round_trip(source, target, iter(TEXT)) == {
        "documents": len(TEXT),
        "tokens_before": before,
        "tokens_after": after,
        "ratio": after / before,
        "chat_template": True,
    }


def swap(raw: dict[str, Any]) -> None:
    vocab = raw["model"]["vocab"]
    vocab.update(t=vocab["h"], h=vocab["t"])


def another_word(raw: dict[str, Any]) -> None:
    raw["normalizer"]["normalizers"].append(
        {"type": "Replace", "pattern": {"String": "hut"}, "content": "hat"}
    )


def first_token(raw: dict[str, Any]) -> None:
    raw["post_processor"]["special_tokens"]["<s>"]["ids"] = [0]


@pytest.mark.parametrize(
    ("kind", "file", "change", "message"),
    [
        (
            "sentencepiece",
            "tokenizer.json",
            another_word,
            "gives .*hat.* gives .*hut.* that begins 'a hi",
        ),
        ("byte-level", "tokenizer.json", swap, "does not follow the order of"),
        ("byte-level", "tokenizer.json", lambda t: t["added_tokens"].pop(), "lacks '<tool>'"),
        ("byte-level", "tokenizer.json", first_token, "gives '<unk>"),
        ("unigram", "tokenizer_config.json", lambda c: c.update(eos_token="<s>"), "special tokens"),
    ],
)
def test_the_proof_fails_on_another_tokenizer(
    pairs, kind: str, file: str, change: Callable[[Any], Any], message: str, tmp_path
) -> None:
    source, target, _ = pairs[kind, "used"]
    broken = shutil.copytree(target, tmp_path / "broken")
    edit(broken / file, change)
    (broken / "added_tokens.json").unlink(missing_ok=True)  # transformers would add from it
    with pytest.raises(ShearlingError, match=message):
        prove_round_trip(source, broken, TEXT)


def test_the_proof_fails_on_another_chat_template(pairs, tmp_path) -> None:
    source, target, _ = pairs["byte-level", "used"]
    broken = shutil.copytree(target, tmp_path / "broken")
    (broken / "chat_template.jinja").write_text(TEMPLATE.replace("<s>", "<S>"))
    with pytest.raises(ShearlingError, match="chat template of .* renders '<S>user"):
        prove_round_trip(source, broken, TEXT)


def test_ids_of_a_configuration() -> None:
    config = {
        "bos_token_id": 10,
        "eos_token_id": [20, 30],
        "pad_token_id": -1,
        "sep_token_id": None,
        "image_token_index": 40,
        "vocab_size": 50,
        "pad_token_type_id": 0,
        "tie_word_embeddings": True,
        "text_config": {"decoder_start_token_id": 30, "hidden_size": 20},
        "suppress_tokens": [10, 11, 20],
        "begin_suppress_tokens": None,
        "bad_words_ids": [[10, 20], [10, 11]],
        "force_words_ids": [[[10], [20, 30]], [40]],
        "forced_decoder_ids": [[1, 20], [2, None]],
        "sequence_bias": [[[20, 30], -2.5]],
        "layer_types": ["full"],
    }
    copy = json.loads(json.dumps(config))
    assert renumber_ids(config, (10, 20, 30, 40)) == config | {
        "bos_token_id": 0,
        "eos_token_id": [1, 2],
        "image_token_index": 3,
        "text_config": {"decoder_start_token_id": 2, "hidden_size": 20},
        "suppress_tokens": [0, 1],
        "bad_words_ids": [[0, 1]],
        "force_words_ids": [[[0], [1, 2]], [3]],
        "forced_decoder_ids": [[1, 1], [2, None]],
        "sequence_bias": [[[1, 2], -2.5]],
    }
    assert config == copy
    assert renumber_ids(config, tuple(range(50))) == config


@pytest.mark.parametrize(
    "config", [{"eos_token_id": 9}, {"eos_token_id": [0, 9]}, {"t": {"x_token_id": 9}}]
)
def test_a_named_id_that_is_gone_is_an_error(config) -> None:
    with pytest.raises(
        ShearlingError, match="names token id 9, which is not among the 3 tokens kept"
    ):
        renumber_ids(config, (0, 1, 2))


def test_ids_left_to_the_model_class_are_written_where_they_move() -> None:
    llama = {"model_type": "llama"}  # whose class takes 1 and 2 for BOS and EOS
    assert renumber_ids(llama, (0, 1, 2)) == llama
    assert renumber_ids(llama, (1, 2)) == llama | {"bos_token_id": 0, "eos_token_id": 1}
    assert renumber_ids(llama, (0, 1)) == llama | {"eos_token_id": None}
    assert renumber_ids(llama | {"eos_token_id": 1}, (0, 1)) == llama | {"eos_token_id": 1}
    assert renumber_ids({"model_type": "unheard of"}, (5,)) == {"model_type": "unheard of"}


def write_model(path: Path, model: dict[str, Any]) -> Path:
    path.mkdir()
    (path / "tokenizer.json").write_text(json.dumps({"model": model}))
    return path


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"type": "WordPiece", "vocab": {}},
            "holds a WordPiece model, but only .* BPE and Unigram",
        ),
        ({"type": "WordLevel", "vocab": {}}, "holds a WordLevel model"),
        ({}, "holds a damaged model"),
        (
            {"type": "BPE", "vocab": {}, "merges": [], "end_of_word_suffix": "</w>"},
            "sets end_of_word_suffix to '</w>'",
        ),
        (
            {"type": "BPE", "vocab": {}, "merges": [], "continuing_subword_prefix": "##"},
            "sets continuing_subword_prefix",
        ),
    ],
)
def test_tokenizers_that_are_not_cut(model, message, tmp_path) -> None:
    source = write_model(tmp_path / "source", model)
    for call in (
        partial(choose_tokens, source, TEXT),
        partial(rewrite_tokenizer, source, (0,), tmp_path),
    ):
        with pytest.raises(ShearlingError, match=message):
            call()


def test_a_tokenizer_without_its_file_is_refused(tmp_path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(ShearlingError, match="has no tokenizer.json, which cutting"):
        choose_tokens(tmp_path, TEXT)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ShearlingError, match="is not valid JSON"):
        choose_tokens(tmp_path, TEXT)


@pytest.mark.parametrize("beyond", [-1, 1])
def test_a_size_that_cannot_be(sources, beyond: int) -> None:
    source = sources["byte-level"]
    least, most = smallest(source), load(source).get_vocab_size()
    assert least == 3 + 256 + 1
    size = least - 1 if beyond < 0 else most + 1
    with pytest.raises(
        ShearlingError, match=rf"a vocabulary of {size} tokens .* ask for {least} to {most}"
    ):
        choose_tokens(source, TEXT, size)


@pytest.mark.parametrize("documents", [[], [""]])
def test_no_text(pairs, documents: list[str]) -> None:
    source, target, _ = pairs["characters", "used"]
    with pytest.raises(ShearlingError, match="text to choose tokens by is empty"):
        choose_tokens(source, documents)
    with pytest.raises(ShearlingError, match="no text to prove"):
        prove_round_trip(source, target, documents)


@pytest.mark.parametrize("kept", [(), (1, 0), (0, 0, 1), (-1, 0)])
def test_ids_out_of_order(sources, kept: tuple[int, ...], tmp_path) -> None:
    with pytest.raises(ShearlingError, match="distinct, ascending and not negative"):
        rewrite_tokenizer(sources["byte-level"], kept, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_must_stay_is_asked_for_and_the_source_never_written(pairs, tmp_path) -> None:
    source, _, kept = pairs["sentencepiece", "least"]
    before = contents(source)
    for token in ("<0x41>", "▁", "<unk>"):
        gone = tokens(source)[token]
        assert gone in kept
        with pytest.raises(ShearlingError, match=f"token id {gone} is not among"):
            rewrite_tokenizer(source, tuple(i for i in kept if i != gone), tmp_path)
    with pytest.raises(ShearlingError, match="never written to"):
        rewrite_tokenizer(source, kept, source)
    assert contents(source) == before


def test_what_was_written_is_read_back(sources, tmp_path, monkeypatch) -> None:
    """The library numbers added tokens beyond the vocabulary itself, so a file can be misread."""
    source = sources["byte-level"]
    honest = rewrite._tokenizer

    def wrong(*args: Any) -> dict[str, Any]:
        raw = honest(*args)
        swap(raw)
        return raw

    monkeypatch.setattr(rewrite, "_tokenizer", wrong)
    with pytest.raises(ShearlingError, match="reads token .* keep the whole vocabulary"):
        rewrite_tokenizer(source, choose_tokens(source, SMALL), tmp_path)
