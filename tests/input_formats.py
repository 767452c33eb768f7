"""Every kind of file that others give us, as formats to damage: an example and its reader each."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from fuzzing import Format
from shearling.data.documents import documents
from shearling.data.records import read, split
from shearling.engine.place import Place
from shearling.engine.stream import BlockStream
from shearling.evaluate.tasks.questions import read_questions
from shearling.evaluate.tasks.suite import load_suite
from shearling.model.checkpoint import Checkpoint
from shearling.model.loading import load_model, load_tokenizer
from shearling.model.subject import open_subject
from shearling.train.options import parse
from tiny_gguf import encoded, metadata_of, tensors_of, tiny_llama
from tiny_tokenizer import CHAT, write_llama

RECORDS = [
    {"text": "Sheep graze on the hill."},
    {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ewe."}]},
    {"instruction": "Count.", "input": "ewe, ram", "output": "Two."},
    {"conversations": [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "Baa."}]},
]
SUITE = """
texts:
  - {file: fell.txt, window: 64, bos: true}
  - {hub: ptb, max_windows: 3}
tasks:
  - arc_easy
  - {name: pens, file: pens.jsonl, shots: 2, metric: acc}
degeneration:
  prompts: 4
  file: fell.txt
  temperature: 0.7
"""


def input_formats() -> list[Format]:
    """All of them."""
    return [
        Format("config.json", _model, _run, "config.json"),
        Format("config.json, stock", _model, _load, "config.json"),
        Format("index", _sharded, _read_all, "model.safetensors.index.json"),
        Format("safetensors", _model, _read_all, "model.safetensors", "bytes"),
        Format("safetensors header", _header, _from_header, "header.json"),
        Format("GGUF", _gguf, _converted, "header.bin", "bytes"),
        Format("GGUF metadata", _gguf, _from_values, "header.json"),
        Format("tokenizer.json", _model, _tokenizer, "tokenizer.json"),
        Format("tokenizer_config.json", _model, _tokenizer, "tokenizer_config.json"),
        Format(
            "jsonl", _lines("text.jsonl", RECORDS), _records("text.jsonl"), "text.jsonl", "jsonl"
        ),
        Format(
            "jsonl of text",
            _lines("text.jsonl", RECORDS[:1] * 4),
            _documents,
            "text.jsonl",
            "jsonl",
        ),
        Format("jsonl.gz", _packed, _records("text.jsonl.gz"), "text.jsonl.gz", "bytes"),
        Format("parquet", _table, _records("text.parquet"), "text.parquet", "bytes"),
        Format("questions", _lines("pens.jsonl", _QUESTIONS), _questions, "pens.jsonl", "jsonl"),
        Format(
            "suite",
            _suite,
            lambda root: load_suite(str(root / "suite.yaml")),
            "suite.yaml",
            "bytes",
        ),
        Format("key=value", _pairs, _options, "pairs.txt", "bytes"),
    ]


_QUESTIONS = [{"question": "Which?", "choices": ["ewe", "ram"], "label": n} for n in (0, 1, 0)]


def _model(root: Path) -> None:
    write_llama(root, layers=2, template=CHAT)


def _run(root: Path) -> None:
    """Open a model, and run it as scores and repairs do."""
    stream = BlockStream(Checkpoint.open(root), Place.cpu())
    ids_BS = torch.arange(8)[None]
    h_BSD, calls = stream.begin(ids_BS)
    for index, call in enumerate(calls):
        with stream.block(index) as block:
            h_BSD = stream.run(block, call, h_BSD)
    stream.logits(h_BSD, ids_BS)


def _load(root: Path) -> None:
    """Open a model, and load it as measurements do."""
    open_subject(root)
    load_model(root)


def _read_all(root: Path) -> None:
    checkpoint = Checkpoint.open(root)
    list(checkpoint.read(checkpoint.sizes))


def _sharded(root: Path) -> None:
    _model(root)
    tensors = load_file(root / "model.safetensors")
    (root / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, root / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in shards.items() for name in held}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))


def _header(root: Path) -> None:
    """A model, and beside it the header of its weights as a file of its own."""
    _model(root)
    content = (root / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    (root / "header.json").write_bytes(content[8 : 8 + length].rstrip())
    (root / "numbers").write_bytes(content[8 + length :])


def _from_header(root: Path) -> None:
    header = (root / "header.json").read_bytes()
    content = struct.pack("<Q", len(header)) + header + (root / "numbers").read_bytes()
    (root / "model.safetensors").write_bytes(content)
    _read_all(root)


def _gguf(root: Path) -> None:
    """A GGUF file in two parts, and its header once more, as JSON."""
    tensors = tensors_of(tiny_llama(), "llama")
    places, weights = {}, b""
    for name, tensor in tensors.items():
        places[name] = [list(tensor.shape)[::-1], 0, len(weights)]
        weights += tensor.numpy().tobytes()
        weights += bytes(-len(weights) % 32)
    metadata = metadata_of(tiny_llama().config, "llama")
    values = {"metadata": metadata, "tensors": places}
    (root / "header.json").write_text(json.dumps(values))
    (root / "header.bin").write_bytes(encoded(metadata, places))
    (root / "weights.bin").write_bytes(weights)


def _converted(root: Path) -> None:
    """Put a GGUF file together, and open what it is converted to."""
    header = (root / "header.bin").read_bytes()
    header += bytes(-len(header) % 32)
    (root / "model.gguf").write_bytes(header + (root / "weights.bin").read_bytes())
    before = os.environ.get("SHEARLING_CACHE")
    os.environ["SHEARLING_CACHE"] = str(root / "cache")
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a line for each that is converted
            Checkpoint.open(root / "model.gguf")
    finally:
        del os.environ["SHEARLING_CACHE"]
        if before is not None:
            os.environ["SHEARLING_CACHE"] = before


def _from_values(root: Path) -> None:
    """As above, the header made of its JSON; what is no JSON is no GGUF file either."""
    try:
        values = json.loads((root / "header.json").read_bytes())
    except (ValueError, RecursionError):
        values = None
    values = values if isinstance(values, dict) else {}
    (root / "header.bin").write_bytes(encoded(values.get("metadata"), values.get("tensors")))
    _converted(root)


def _tokenizer(root: Path) -> None:
    load_tokenizer(root)


def _lines(name: str, records: list[dict]) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        (root / name).write_text("\n".join(map(json.dumps, records)))

    return write


def _records(name: str) -> Callable[[Path], None]:
    def use(root: Path) -> None:
        for shard in split(root / name):
            list(read(shard))

    return use


def _documents(root: Path) -> None:
    documents(root / "text.jsonl")


def _packed(root: Path) -> None:
    with gzip.open(root / "text.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, RECORDS * 5)))


def _table(root: Path) -> None:
    rows = [f"{n} sheep on the hill" for n in range(300)]
    table = pa.table({"text": rows, "from": ["fell"] * 300})
    parquet.write_table(table, root / "text.parquet", row_group_size=100)


def _questions(root: Path) -> None:
    read_questions(root / "pens.jsonl")


def _suite(root: Path) -> None:
    (root / "suite.yaml").write_text(SUITE)


def _pairs(root: Path) -> None:
    (root / "pairs.txt").write_text(
        "lr=1e-4 betas=[0.9,0.95] weights.c4=1.0 trackers=[] seed=3 mix=constant"
    )


def _options(root: Path) -> None:
    text = (root / "pairs.txt").read_bytes().decode(errors="surrogateescape")
    parse("cpt", 1000, text.split(" "))
