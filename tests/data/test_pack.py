from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import random
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from process_work import die, killed_pack
from processes import ended, serve, started
from shearling.data import encode, merge, shards
from shearling.data.encode import Encoder
from shearling.data.merge import DOCUMENT, choose_held_out
from shearling.data.pack import PackPlan, pack
from shearling.data.records import Chat, Document, Exchange, digest
from shearling.data.store import Store
from shearling.errors import ShearlingError
from tiny_tokenizer import byte_tokenizer

BOS, EOS = 256, 257
CHATML = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


def tokenizer_with(template: str | None = CHATML) -> PreTrainedTokenizerBase:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def byte_ids(text: str) -> list[int]:
    """What a token a byte means, without a tokenizer: the special ones are in angle brackets."""
    table = _table()
    parts = text.replace("</s>", "\0e").replace("<s>", "\0b").split("\0")
    ids = [table[byte] for byte in parts[0].encode()]
    for part in parts[1:]:
        ids += [BOS if part[0] == "b" else EOS, *(table[byte] for byte in part[1:].encode())]
    return ids


@cache
def _table() -> dict[int, int]:
    """The id of each byte."""
    vocabulary = byte_tokenizer().get_vocab()
    return {byte: vocabulary[symbol] for byte, symbol in zip(range(256), _symbols(), strict=True)}


def _symbols() -> list[str]:
    """GPT-2's character for each byte: printable ones are their own, others follow from 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


def write_lines(path: Path, values: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def write_texts(path: Path, texts: Sequence[str]) -> Path:
    return write_lines(path, [{"text": text} for text in texts])


def plan(*specs: object, tokenizer: Any = None, length: int = 8, **options: Any) -> PackPlan:
    given_specs = [str(spec) for spec in specs]
    return PackPlan.of(given_specs, tokenizer or tokenizer_with(), "tiny", length=length, **options)


def rows(store: Store, domain: str, part: str) -> list[list[int]]:
    sequences = store.sequences(domain, part)
    return sequences[range(len(sequences))][0].tolist()


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a store, hidden ones included."""
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def naive_split(texts: Sequence[str], share: float, length: int, seed: int) -> list[bool]:
    """Which texts are held out, by a plain loop over sets of equal ones."""

    def place(text: str) -> float:
        found = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
        return int.from_bytes(found, "little") / 2**64

    def tokens(chosen: set[str]) -> int:
        return sum(len(text.encode()) + 1 for text in texts if text in chosen)

    train = {text for text in texts if place(text) >= share}
    held = set(texts) - train
    for text in sorted(train, key=place) if share else []:
        if tokens(held) < length and tokens(train - {text}) >= length:
            train, held = train - {text}, held | {text}
    return [text in held for text in texts]


def check_tail(
    manifest: dict[str, Any], output: Path, texts: Sequence[str], held: Sequence[bool], longest: str
) -> None:
    """The end of the longest text is held out, and nothing is lost or comes twice."""
    length, tail = manifest["length"], manifest["domains"]["web"]["held_out_end"]
    tokens = len(byte_ids(longest)) + 1
    assert tail == min(max(round(manifest["held_out"] * tokens), length), tokens - length)
    streams: list[list[int]] = [[], []]
    for text, side in zip(texts, held, strict=True):
        ids = [*byte_ids(text), EOS]
        if text == longest:
            streams[0] += ids[:-tail]
            streams[1] += ids[-tail:]
        else:
            streams[side] += ids
    store = Store.open(output)
    for part, stream in zip(("train", "held_out"), streams, strict=True):
        whole = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
        assert rows(store, "web", part) == whole
    parts = manifest["domains"]["web"]
    assert parts["train"]["documents"] + parts["held_out"]["documents"] == len(texts)


def naive_rows(texts: Sequence[str], length: int) -> list[list[int]]:
    ids = [i for text in texts for i in [*byte_ids(text), EOS]]
    return [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text("abö ", min_size=1, max_size=9), min_size=1, max_size=30),
    length=st.integers(2, 12),
    share=st.sampled_from([0.0, 0.02, 0.3, 0.9]),
    seed=st.integers(0, 3),
    shard_bytes=st.integers(1, 400),
    cut=st.integers(0, 30),
)
def test_a_store_holds_what_a_plain_loop_makes(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], length: int, share: float,
    seed: int, shard_bytes: int, cut: int,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("naive")
    # The order is that of the files' names, then that of the lines.
    write_texts(folder / "web" / "b.jsonl", texts[cut:])
    write_texts(folder / "web" / "a.jsonl", texts[:cut])
    texts = [text for text in [*texts[:cut], *texts[cut:]] if text.strip()]
    held = naive_split(texts, share, length, seed)
    expected = {
        part: [text for text, side in zip(texts, held, strict=True) if side == chosen]
        for part, chosen in (("train", False), ("held_out", True))
    }
    planned = plan(folder / "web", length=length, held_out=share, seed=seed)
    wanted = ("train", "held_out") if share else ("train",)
    if not all(naive_rows(expected[part], length) for part in wanted):
        longest = max(texts, key=lambda text: len(text.encode()), default="")
        if share and texts.count(longest) == 1 and len(longest.encode()) + 1 >= 2 * length:
            check_tail(pack(planned, folder / "out"), folder / "out", texts, held, longest)
            return
        with pytest.raises(ShearlingError, match="'web'"):
            pack(planned, folder / "out", shard_bytes=shard_bytes)
        with pytest.raises(ShearlingError):
            Store.open(folder / "out")
        return
    manifest = pack(planned, folder / "out", shard_bytes=shard_bytes)
    store = Store.open(folder / "out")
    assert store.manifest.to_json() == manifest
    for part, chosen in expected.items():
        sequences = naive_rows(chosen, length)
        total = sum(len(byte_ids(text)) + 1 for text in chosen)
        assert rows(store, "web", part) == sequences
        described = manifest["domains"]["web"][part]
        assert described | {"tokens_sha256": ""} == {
            "documents": len(chosen), "sequences": len(sequences),
            "tokens": len(sequences) * length, "learned_tokens": len(sequences) * length,
            "dropped_remainder": total - len(sequences) * length, "dropped_without_answer": 0,
            "tokens_sha256": "",
        }  # fmt: skip


@given(
    documents=st.lists(
        st.tuples(st.integers(0, 15).map(lambda i: i << 60), st.integers(1, 9)), max_size=20
    ),
    share=st.sampled_from([0.0, 0.01, 0.25, 0.5, 0.99]),
    length=st.integers(2, 20),
)
def test_who_is_held_out(documents: list[tuple[int, int]], share: float, length: int) -> None:
    table = np.array(documents, dtype=DOCUMENT)
    held = choose_held_out(table, share, length)
    sizes = table["tokens"].astype(int)
    side = dict(zip(table["digest"].tolist(), held.tolist(), strict=True))
    assert [side[digest] for digest in table["digest"].tolist()] == held.tolist()
    lowest = table["digest"] < share * 2**64
    assert held[lowest].all()
    added = held & ~lowest
    if share == 0 or sizes[lowest].sum() >= length:
        assert not added.any()
    if added.any():
        assert sizes[~held].sum() >= length
    order = np.random.default_rng(0).permutation(len(table))
    assert (choose_held_out(table[order], share, length) == held[order]).all()


def test_parts_share_no_document(tmp_path: Path) -> None:
    """Though documents come several times, in several files, in any order."""
    texts = [f"sheep number {i % 300}" for i in range(900)]
    random.Random(0).shuffle(texts)
    sides: list[list[set[tuple[int, ...]]]] = []
    for name, order in (("one", texts), ("two", sorted(texts))):
        write_texts(tmp_path / name / "a.jsonl", order[:411])
        write_texts(tmp_path / name / "b.jsonl", order[411:])
        pack(plan(tmp_path / name, held_out=0.1, length=2), tmp_path / f"{name}.store")
        store = Store.open(tmp_path / f"{name}.store")
        sides.append([])
        for part in ("train", "held_out"):
            ids = [i for row in rows(store, name, part) for i in row]
            # At most a token was dropped: the EOS of the last.
            ends = [i for i, token in enumerate([*ids, EOS]) if token == EOS]
            starts = [0, *(end + 1 for end in ends)]
            found = {tuple(ids[a:b]) for a, b in zip(starts, ends, strict=False)} - {()}
            sides[-1].append(found)
    assert sides[0] == sides[1]
    train, held = sides[0]
    assert not train & held
    assert train | held == {tuple(byte_ids(text)) for text in texts}
    assert 10 <= len(held) <= 60


# --- the same store, whatever happens


@pytest.fixture(scope="module", autouse=True)
def _server() -> None:
    """Workers are forked from the server that has imported everything, and begin at once."""
    serve()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, a second domain of two files, and a third with masks in some of its shards only."""
    path = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    texts = [
        " ".join(rng.choices(["sheep", "wool", "grün"], k=rng.randint(1, 30))) for _ in range(90)
    ]
    write_texts(path / "web.jsonl", texts)
    write_texts(path / "books" / "1.jsonl", texts[:30])
    (path / "books" / "2.txt").write_text("\n".join(texts))
    pairs = [{"question": text, "answer": f"{i} times"} for i, text in enumerate(texts)]
    write_lines(path / "mixed.jsonl", [*({"text": t} for t in texts[:40]), *pairs, {"text": "end"}])
    return path


SPECS = ("web.jsonl", "books", "mixed.jsonl")


def corpus_plan(corpus: Path, **options: Any) -> PackPlan:
    return plan(*(corpus / spec for spec in SPECS), held_out=0.1, **options)


@pytest.fixture(scope="session")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("reference") / "store"
    pack(corpus_plan(corpus), output, workers=1)
    found = contents(output)
    assert len(found) == 1 + 2 * 2 + 2 + 2  # the manifest, tokens, and masks of "mixed"
    return found


@pytest.mark.parametrize(("workers", "shard_bytes"), [(1, 300), (2, 700), (3, 10**6)])
def test_workers_and_shards_do_not_show(
    corpus: Path, reference: dict[str, bytes], tmp_path: Path, workers: int, shard_bytes: int
) -> None:
    pack(corpus_plan(corpus), tmp_path / "s", workers=workers, shard_bytes=shard_bytes)
    assert contents(tmp_path / "s") == reference
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_batches_and_chunks_do_not_show(
    corpus: Path, reference: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records tokenised three at a time or fewer, documents copied a few tokens at a time."""
    monkeypatch.setattr(shards, "BATCH_RECORDS", 3)
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 90)
    monkeypatch.setattr(merge, "CHUNK", 50)
    pack(corpus_plan(corpus), tmp_path / "s", workers=1)
    assert contents(tmp_path / "s") == reference


@pytest.mark.parametrize(
    ("stage", "share", "workers"),
    [("tokenising", 0.4, 1), ("tokenising", 0.4, 2), ("packing domains", 0.5, 1)],
)
def test_a_killed_pack_goes_on(
    corpus: Path, reference: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    stage: str, share: float, workers: int,
) -> None:  # fmt: skip
    output, said = tmp_path / "store", tmp_path / "said"
    running = started(
        killed_pack, corpus_plan(corpus), output, workers, 700, stage, share, said=said
    )
    assert ended(running, said, fails=True) == [-signal.SIGKILL], list(said.iterdir())
    with pytest.raises(ShearlingError, match="still being written"):
        Store.open(output)
    before = {
        file.stem: file.stat().st_mtime_ns for file in (output / ".unfinished").glob("*/*.json")
    }
    assert len(before) >= 3

    again: list[str] = []
    write = shards._write

    def counting(task: Any, *rest: Any) -> None:
        again.append(task.path)
        write(task, *rest)

    monkeypatch.setattr(shards, "_write", counting)
    pack(corpus_plan(corpus), output, workers=1, shard_bytes=700)
    assert contents(output) == reference
    everything: list[str] = []
    monkeypatch.setattr(
        shards, "_write", lambda task, *rest: (everything.append(1), write(task, *rest))
    )
    pack(corpus_plan(corpus), tmp_path / "whole", workers=1, shard_bytes=700)
    # With two workers a shard may have been finished that the parent had not yet heard of.
    assert len(again) <= len(everything) - 3
    assert (again == []) == (stage == "packing domains")


def test_an_interrupted_pack_goes_on(
    corpus: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    for share in (0.2, 0.5, 0.9):

        def interrupt(stage: str, done: float, total: float, share: float = share) -> None:
            if stage == "tokenising" and total > done > share * total:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pack(
                corpus_plan(corpus), tmp_path / "s", workers=1, shard_bytes=700, progress=interrupt
            )
    pack(corpus_plan(corpus), tmp_path / "s", workers=1, shard_bytes=700)
    assert contents(tmp_path / "s") == reference


def test_an_interrupt_stops_the_workers(corpus: Path, tmp_path: Path) -> None:
    def interrupt(stage: str, done: float, total: float) -> None:
        if stage == "tokenising":
            raise KeyboardInterrupt

    others = set(multiprocessing.active_children())
    with pytest.raises(KeyboardInterrupt):
        pack(corpus_plan(corpus), tmp_path / "s", workers=2, shard_bytes=700, progress=interrupt)
    assert set(multiprocessing.active_children()) <= others


def test_a_finished_store_is_left_alone(
    corpus: Path, reference: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pack(corpus_plan(corpus), tmp_path / "s", workers=1)
    monkeypatch.setattr(shards, "_write", lambda *_: pytest.fail("tokenised again"))
    assert pack(corpus_plan(corpus), tmp_path / "s", workers=1) == first
    assert contents(tmp_path / "s") == reference


def test_what_was_mended_is_done_again_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abcd":
        write_texts(tmp_path / "web" / f"{name}.jsonl", [f"{name} {i}" for i in range(40)])
    whole = (tmp_path / "web" / "c.jsonl").read_text()

    def interrupt(stage: str, done: float, total: float) -> None:
        if stage == "tokenising":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(plan(tmp_path / "web"), tmp_path / "s", workers=1, progress=interrupt)
    (tmp_path / "web" / "c.jsonl").write_text(whole + "{}\n")
    with pytest.raises(ShearlingError, match="Line 41 of .*c.jsonl"):  # what was there stays
        pack(plan(tmp_path / "web"), tmp_path / "s", workers=1)
    (tmp_path / "web" / "c.jsonl").write_text(whole)
    # A finished one that has changed is done again, though nothing was wrong with it.
    write_texts(tmp_path / "web" / "b.jsonl", [f"B {i}" for i in range(40)])
    write_texts(tmp_path / "web" / "0.jsonl", ["0"])
    refused(lambda: pack(plan(tmp_path / "web"), tmp_path / "s"), "other files")
    (tmp_path / "web" / "0.jsonl").unlink()
    done: list[str] = []
    write = shards._write
    monkeypatch.setattr(
        shards, "_write", lambda task, *r: (done.append(task.shard.file.name), write(task, *r))
    )
    pack(plan(tmp_path / "web"), tmp_path / "s", workers=1)
    assert done == ["b.jsonl", "c.jsonl", "d.jsonl"]
    pack(plan(tmp_path / "web"), tmp_path / "fresh", workers=1)
    assert contents(tmp_path / "s") == contents(tmp_path / "fresh")


# --- what becomes of a record


def encoded(record: Any, tokenizer: Any = None) -> tuple[list[int], list[bool] | None]:
    ((ids, mask),) = Encoder(tokenizer or tokenizer_with())([(1, record)], lambda n: f"Line {n}")
    return ids.tolist(), None if mask is None else mask.tolist()


def spelled(*parts: tuple[str, bool]) -> tuple[list[int], list[bool]]:
    ids = [byte_ids(text) for text, _ in parts]
    masks = [[learned] * len(part) for part, (_, learned) in zip(ids, parts, strict=True)]
    return [i for part in ids for i in part], [i for part in masks for i in part]


def test_only_answers_are_learned() -> None:
    assert encoded(Document("Schäfer")) == ([*byte_ids("Schäfer"), EOS], None)
    assert encoded(Exchange("Wie viele Schäfer?\n\n", "zwölf")) == spelled(
        ("Wie viele Schäfer?\n\n", False), ("zwölf</s>", True)
    )
    chat = (
        ("system", "Be ä sheep."), ("user", "Baa?"), ("assistant", " Bää "), ("assistant", " "),
        ("user", "assistant"), ("assistant", "assistant"),
    )  # fmt: skip
    assert encoded(Chat(chat)) == spelled(
        ("<s>system\nBe ä sheep.</s>\n<s>user\nBaa?</s>\n<s>assistant\n", False),
        (" Bää </s>", True),
        ("\n<s>assistant\n </s>\n<s>user\nassistant</s>\n<s>assistant\n", False),
        ("assistant</s>", True),
    )  # fmt: skip
    ends_with_user = (("user", "Baa?"), ("assistant", "Bää"), ("user", "Why?"))
    assert encoded(Chat(ends_with_user)) == spelled(
        ("<s>user\nBaa?</s>\n<s>assistant\n", False), ("Bää</s>", True),
        ("\n<s>user\nWhy?</s>", False),
    )  # fmt: skip


# Templates that differ in what they put around an answer, and what is learned of it.
TEMPLATES: dict[str, tuple[str, list[tuple[str, bool]]]] = {
    "no end of turn": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
        [("user: Q\nassistant:", False), (" A B", True), ("\nuser: R\nassistant:", False),
         (" C</s>", True)],
    ),
    "ignores the wish for an answer, trims": (
        "<s>{% for m in messages %}{% if m['role'] == 'user' %}{{ '[' + m['content'] + ']' }}"
        "{% else %}{{ '(' + m['content'] | trim + ')</s>' }}{% endif %}{% endfor %}",
        [("<s>[Q](", False), ("A B)</s>", True), ("[R](", False), ("C)</s>", True)],
    ),
    "a thought before the last answer": (
        "{% for m in messages %}{{ '<s>' + m['role'] + '\n' }}"
        "{% if loop.last and m['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}"
        "{{ m['content'] + '</s>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}",
        [("<s>user\nQ</s>\n<s>assistant\n", False), ("A B</s>", True),
         ("\n<s>user\nR</s>\n<s>assistant\n", False), ("<think></think>C</s>", True)],
    ),
    "an end after the last turn only": (
        "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ';' }}"
        "{% if loop.last %}{{ '</s>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}",
        [("user Q;assistant ", False), ("A B", True), (";user R;assistant ", False),
         ("C;</s>", True)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates(name: str) -> None:
    template, expected = TEMPLATES[name]
    tokenizer = tokenizer_with(template)
    chat = (("user", "Q"), ("assistant", "A B"), ("user", "R"), ("assistant", "C"))
    found = encoded(Chat(chat), tokenizer)
    assert found == spelled(*expected)
    messages = [{"role": role, "content": content} for role, content in chat]
    rendered: Any = tokenizer.apply_chat_template(messages, tokenize=False)
    whole = byte_ids(rendered.rstrip())
    assert found[0] == [*whole, *[EOS] * (whole[-1] != EOS)]


def test_a_token_across_the_border_is_learned() -> None:
    """Words with the blank before them: the model has to choose the blank as well."""
    vocabulary = {"Say": 0, "▁one": 1, "▁two": 2, "</s>": 3, "<unk>": 4}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    assert encoded(Exchange("Say one ", "two"), tokenizer) == (
        [0, 1, 2, 3], [False, False, True, True],
    )  # fmt: skip


def with_bos() -> PreTrainedTokenizerBase:
    tokenizer = tokenizer_with("<s>" + CHATML)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def test_bos_where_the_tokenizer_puts_it() -> None:
    assert encoded(Document("a"), with_bos())[0] == [BOS, *byte_ids("a"), EOS]
    assert encoded(Exchange("a", "b"), with_bos()) == spelled(("<s>a", False), ("b</s>", True))
    ids, _ = encoded(Chat((("user", "a"), ("assistant", "b"))), with_bos())
    assert ids[:3] == byte_ids("<s><s>u")  # the template's own, and no other


def test_long_documents_are_tokenised_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "PIECE_CHARACTERS", 10)
    text = "one sheep\ntwo sheep\nand a shepherd"
    found = Encoder(with_bos())([(1, Document(text)), (2, Document("b"))], str)
    assert [ids.tolist() for ids, _ in found] == [
        [BOS, *byte_ids(text), EOS], [BOS, *byte_ids("b"), EOS],
    ]  # fmt: skip


def test_labels_in_a_store(tmp_path: Path) -> None:
    """Cut into sequences, of which those without an answer are left out."""
    values = [{"prompt": "p" * (3 * i % 17), "completion": "c" * (i % 5 + 1)} for i in range(40)]
    ids, mask = spelled(
        *(part for v in values for part in ((v["prompt"], False), (v["completion"] + "</s>", True)))
    )
    expected, dropped = [], 0
    for i in range(0, len(ids) - 7, 8):
        if any(mask[i + 1 : i + 8]):
            labels = [
                t if m else -100 for t, m in zip(ids[i : i + 8], mask[i : i + 8], strict=True)
            ]
            expected.append((ids[i : i + 8], labels))
        else:
            dropped += 8
    assert dropped
    file = write_lines(tmp_path / "pairs.jsonl", [*values, {"prompt": "p", "completion": ""}])
    manifest = pack(plan(file, held_out=0), tmp_path / "s", shard_bytes=200)["domains"]["pairs"]
    sequences = Store.open(tmp_path / "s").sequences("pairs")
    found_ids, found_labels = sequences[range(len(sequences))]
    assert list(zip(found_ids.tolist(), found_labels.tolist(), strict=True)) == expected
    assert manifest["left_out"] == 1
    assert manifest["train"]["dropped_without_answer"] == dropped
    assert manifest["train"]["learned_tokens"] == int((found_labels != -100).sum())


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    vocabulary = {f"w{i}": i for i in range(2**16)} | {"</s>": 2**16}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    file = write_texts(tmp_path / "a.jsonl", ["w65535 w1"])
    options: dict[str, Any] = {"length": 3, "held_out": 0}
    assert pack(plan(file, tokenizer=tokenizer, **options), tmp_path / "s")["dtype"] == "uint32"
    assert rows(Store.open(tmp_path / "s"), "a", "train") == [[65535, 1, 65536]]


def test_the_manifest(tmp_path: Path) -> None:
    file = write_texts(tmp_path / "web.jsonl", [f"{i} sheep" for i in range(50)])
    tokenizer = with_bos()
    manifest = pack(plan(file, tokenizer=tokenizer, seed=3), tmp_path / "s")
    assert manifest == json.loads((tmp_path / "s" / "store.json").read_text())
    sha = hashlib.sha256(file.read_bytes()).hexdigest()
    assert manifest["sources"] == {
        "web": [{"file": "web.jsonl", "bytes": file.stat().st_size, "sha256": sha}]
    }
    assert (manifest["kind"], manifest["length"], manifest["held_out"]) == ("token-store", 8, 0.02)
    assert (manifest["seed"], manifest["dtype"]) == (3, "uint16")
    assert manifest["tokenizer"]["name"] == "tiny"
    assert (manifest["tokenizer"]["bos"], manifest["tokenizer"]["eos"]) == ("<s>", "</s>")
    for part in ("train", "held_out"):
        tokens = (tmp_path / "s" / "web" / part / "tokens.bin").read_bytes()
        found = manifest["domains"]["web"][part]
        assert found["tokens_sha256"] == hashlib.sha256(tokens).hexdigest()
        assert found["sequences"] >= 1
    assert str(tmp_path) not in json.dumps(manifest)


# --- what is refused


def refused(run: Callable[[], object], *expected: str) -> None:
    with pytest.raises(ShearlingError) as error:
        run()
    sentence = str(error.value)
    assert "\n" not in sentence
    for part in expected:
        assert part in sentence


@pytest.fixture
def web(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "web.jsonl", [f"{i} sheep" for i in range(50)])


@pytest.mark.parametrize("bos", [None, True])
def test_a_text_alone_has_its_end_held_out(tmp_path: Path, bos: bool | None) -> None:
    text = " ".join(map(str, range(999)))
    (tmp_path / "book.txt").write_text(text)
    planned = plan(tmp_path / "book.txt", length=64, held_out=0.1, bos=bos)
    described = pack(planned, tmp_path / "s")["domains"]["book"]
    tokens = len(text) + (1 if bos is None else 2)
    assert described["held_out_end"] == round(0.1 * tokens)
    assert (described["train"]["documents"], described["held_out"]["documents"]) == (1, 0)
    store = Store.open(tmp_path / "s")
    said = [
        [i for row in rows(store, "book", part) for i in row if i != BOS]
        for part in ("train", "held_out")
    ]
    ids = [*byte_ids(text), EOS]
    train, held = (len(ids) - described["held_out_end"], described["held_out_end"])
    assert said[0] == ids[: len(said[0])]
    assert said[1] == ids[train : train + len(said[1])]
    assert train - 64 < len(said[0]) <= train
    assert held - 64 < len(said[1]) <= held


def test_domains_that_are_too_small(tmp_path: Path) -> None:
    output = tmp_path / "s"
    empty = write_texts(tmp_path / "empty.jsonl", [" ", "\n"])
    refused(lambda: pack(plan(empty), output), "'empty'", "no text")
    (tmp_path / "book.txt").write_text("one long document " * 9)
    book = plan(tmp_path / "book.txt", length=82)
    refused(lambda: pack(book, tmp_path / "b"), "163 tokens in 1 document, too", "--held-out 0")
    twice = write_texts(tmp_path / "twice.jsonl", ["one long document " * 9] * 2)
    refused(lambda: pack(plan(twice), tmp_path / "t"), "326 tokens in 1 document, which are not")
    whole = plan(tmp_path / "book.txt", held_out=0)
    assert pack(whole, tmp_path / "c")["domains"]["book"]["held_out"]["sequences"] == 0
    short = plan(tmp_path / "book.txt", held_out=0, length=1000)
    refused(lambda: pack(short, tmp_path / "d"), "163 tokens", "1,000 tokens", "--length")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_wrong_line_is_named_and_leaves_nothing(tmp_path: Path, workers: int) -> None:
    values: list[Any] = [{"text": "sheep"}] * 30
    values[20] = {"txt": "goat"}
    file = write_lines(tmp_path / "web.jsonl", values)
    run = lambda: pack(plan(file), tmp_path / "s", workers=workers, shard_bytes=10**6)  # noqa: E731
    refused(run, f"Line 21 of {file}", "txt")
    assert list(tmp_path.iterdir()) == [file]
    (tmp_path / "s").mkdir()
    refused(run, "Line 21")


@pytest.mark.parametrize("there", [False, True])
def test_what_is_refused_when_all_is_tokenised_leaves_nothing(
    web: Path, tmp_path: Path, there: bool
) -> None:
    """So that other options are no others, and nobody calls it half-written."""
    tiny, output = write_texts(tmp_path / "tiny.jsonl", ["baa"]), tmp_path / "s"
    if there:
        output.mkdir()
    for workers in (1, 2):
        refused(lambda n=workers: pack(plan(web, tiny), output, workers=n), "'tiny'", "too little")
        assert output.exists() == there
        assert not there or list(output.iterdir()) == []
    refused(lambda: Store.open(output), "pack`")
    pack(plan(web, length=6), output)


def test_conversations_that_will_not_do(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    file = write_lines(tmp_path / "chat.jsonl", [{"text": "a"}, chat])
    for template, expected in (
        (None, ("no chat template", "--tokenizer")),
        ("{{ raise_exception('Roles\nmust alternate.') }}", ("Roles must alternate);",)),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", ("leaves out message 2",)),
        ("{{ messages[-1]['content'] | upper }}", ("leaves out message 2",)),
    ):
        planned = plan(file, tokenizer=tokenizer_with(template))
        refused(lambda p=planned: pack(p, tmp_path / "s"), f"Line 2 of {file}", *expected)


def test_options_that_will_not_do(web: Path) -> None:
    refused(lambda: plan(web, length=1), "length is 1")
    refused(lambda: plan(web, held_out=1.0), "held-out is 1.0")
    refused(lambda: plan(web, held_out=-0.1), "held-out is -0.1")
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    refused(lambda: plan(web, tokenizer=tokenizer), "no EOS token", "eos_token")


@pytest.mark.parametrize("state", ["finished", "begun"])
def test_an_output_of_other_options(web: Path, tmp_path: Path, state: str) -> None:
    output = tmp_path / "s"

    def stop(stage: str, done: float, total: float) -> None:
        if stage == "packing domains" and state == "begun":
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        pack(plan(web), output, progress=stop)
    before = contents(output)
    other = write_texts(tmp_path / "other" / "web.jsonl", ["goat"] * 50)
    second = write_texts(tmp_path / "more.jsonl", ["goat"] * 50)
    tokenizer = tokenizer_with()
    tokenizer.add_tokens("sheep")
    refused(lambda: pack(plan(web, length=9), output), str(output), "length 8 there and 9 here")
    refused(lambda: pack(plan(web, seed=1, held_out=0), output), "held_out 0.02", "seed 0")
    refused(lambda: pack(plan(web, tokenizer=tokenizer), output), "another tokenizer")
    refused(lambda: pack(plan(web, tokenizer=tokenizer_with(None)), output), "another tokenizer")
    refused(lambda: pack(plan(web, second), output), "other files")
    if state == "finished":
        refused(lambda: pack(plan(other), output), "other files")
    assert contents(output) == before


def test_a_taken_output(web: Path, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "precious.txt").write_text("mine")
    refused(lambda: pack(plan(web), tmp_path / "s"), "not empty", "name a new one")
    assert [file.name for file in (tmp_path / "s").iterdir()] == ["precious.txt"]
    refused(lambda: pack(plan(web), web), "is a file")


def test_one_process_at_a_time(web: Path, tmp_path: Path) -> None:
    output = tmp_path / "s"
    seen: list[str] = []

    def again(stage: str, done: float, total: float) -> None:
        seen.append(stage)
        refused(lambda: pack(plan(web), output), "is being written by process")
        refused(lambda: Store.open(output), "still being written")

    pack(plan(web), output, progress=again)
    assert seen == ["hashing files", "tokenising", "packing domains"]
    assert len(Store.open(output).sequences("web")) > 0


def test_a_full_disk(web: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(merge, "_distribute", full)
        refused(lambda: pack(plan(web), tmp_path / "s"), "disk ran full", "same command again")
    monkeypatch.setattr(shards, "_write", lambda *_: pytest.fail("tokenised again"))
    pack(plan(web), tmp_path / "s")


def test_a_killed_worker(web: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_work", die)
    run = lambda: pack(plan(web), tmp_path / "s", workers=2, shard_bytes=100)  # noqa: E731
    refused(run, "worker process was killed", "fewer --workers")


def test_what_is_refused_stays_if_an_earlier_run_began_it(web: Path, tmp_path: Path) -> None:
    tiny, output = write_texts(tmp_path / "tiny.jsonl", ["baa"]), tmp_path / "s"

    def stop(stage: str, done: float, total: float) -> None:
        if stage == "tokenising" and done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(plan(web, tiny), output, workers=1, progress=stop)
    refused(lambda: pack(plan(web, tiny), output), "too little")
    refused(lambda: Store.open(output), "still being written")


def test_equal_texts_have_equal_digests_in_every_domain() -> None:
    """So that what one domain holds out, another does not train on, but for the smallest."""
    assert digest(Document("a"), 1) == digest(Document("a"), 1) != digest(Document("a"), 2)
