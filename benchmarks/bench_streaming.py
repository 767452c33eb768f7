"""Models larger than memory: peak memory of scoring and cutting, and the cost of a cut.

Random weights of a Llama of about 1.5 billion parameters (6 GB in float32, 24 blocks) and of one
with half as many blocks of the same size; scored by perplexity and by Taylor expansion, and cut,
in processes of their own. Then the larger is cut and its kept bytes are copied, in turns.

    python benchmarks/bench_streaming.py [directory for about 20 GB of scratch]

writes results/streaming.json.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from common import measured, save
from shearling.engine.place import Place
from shearling.files.writer import new_directory, write_json, write_weights
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.choose import without
from shearling.pruning.cut import cut
from shearling.table.families import family_of

SAMPLES, LENGTH = 2, 64
# A repair takes four sequences at least; the shape touches blocks and neurons, as --params does.
REPAIR = ["--samples", "8", "--length", "64", "--copies", "1", "--stream"]
REPAIR_SHAPE = "layers={},mlp=6000"


def random_model(directory: Path, blocks: int) -> Path:
    """Write a Llama of ``blocks`` blocks of 55 M parameters each, without ever holding it."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=6656,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=32,
        architectures=["LlamaForCausalLM"],
    )
    family = family_of("llama", "the benchmark's model")
    shapes = family.layout(config).tensors(family.shape(config))
    generator = torch.Generator().manual_seed(0)

    def load(names: list[str]) -> dict[str, torch.Tensor]:
        return {n: 0.02 * torch.randn(shapes[n], generator=generator) for n in names}

    sizes = {name: 4 * torch.Size(shape).numel() for name, shape in shapes.items()}
    with new_directory(directory) as staging:
        write_weights(staging, sizes, load, shard_bytes=2 * 10**9)
        write_json(staging / "config.json", config.to_dict())
        words = {f"w{i}": i for i in range(31999)} | {"?": 31999}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(staging)
    return directory


def copy(source: Path, target: Path, amount: int) -> float:
    """Seconds to read ``amount`` bytes of a model's shards and write them, flushed to disk."""
    started = time.perf_counter()
    target.mkdir()
    for shard in sorted(source.glob("*.safetensors")):
        with shard.open("rb") as read, (target / shard.name).open("wb") as write:
            while amount > 0 and (chunk := read.read(min(amount, 8 << 20))):
                write.write(chunk)
                amount -= len(chunk)
            write.flush()
            os.fsync(write.fileno())
    return time.perf_counter() - started


def cut_times(path: Path, scratch: Path) -> dict[str, object]:
    """Cut a quarter of the blocks and copy the same bytes, three times in turns."""
    source = Checkpoint.open(path)
    depth = source.shape["layers"]
    times: dict[str, list[float]] = {"copy": [], "cut": [], "whole_cut_with_proof": []}
    kept = 0
    for _ in range(3):
        marks: dict[str, float] = {}

        def mark(stage: str, done: float, total: float, /, marks: dict = marks) -> None:
            marks.setdefault(f"{stage} begun", time.perf_counter())
            marks[f"{stage} ended"] = time.perf_counter()

        started = time.perf_counter()
        result = cut(
            source,
            without(range(2, depth, 4), depth),
            scratch / "cut",
            place=Place.cpu(streamed=True),
            progress=mark,
        )
        whole = time.perf_counter() - started
        times["whole_cut_with_proof"].append(whole)
        proof = marks["proving the cut ended"] - marks["proving the cut begun"]
        times["cut"].append(whole - proof)  # reading, writing, hashing, flushing to disk
        kept = result.bytes
        times["copy"].append(copy(path, scratch / "copy", kept))
        shutil.rmtree(scratch / "cut")
        shutil.rmtree(scratch / "copy")
    seconds = {name: [round(s, 2) for s in values] for name, values in times.items()}
    ratios = sorted(a / b for a, b in zip(times["cut"], times["copy"], strict=True))
    return {"kept_bytes": kept, "seconds": seconds, "cut_over_copy": round(ratios[1], 2)}


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        scratch = Path(folder)
        text = scratch / "text.txt"
        text.write_text(" ".join(f"w{i * 7919 % 31999}" for i in range(2000)))
        figures: dict[str, Any] = {}
        for blocks in (12, 24):
            path = random_model(scratch / f"{blocks}-blocks", blocks)
            common = ["--calibration", str(text), "--samples", str(SAMPLES), "--stream"]
            common += ["--length", str(LENGTH)]
            pruned = scratch / f"pruned-{blocks}"
            figures[f"{blocks}_blocks"] = {
                "bytes": Checkpoint.open(path).bytes,
                "score_perplexity": measured(["score", str(path), *common]),
                "score_taylor": measured(["score", str(path), "--by", "taylor", *common]),
                "prune": measured(
                    ["prune", str(path), "--remove", "3,7,9", "--stream", "--output", str(pruned)]
                ),
            }
            shutil.rmtree(pruned)
            figures[f"{blocks}_blocks"]["prune_and_repair"] = measured(
                ["prune", str(path), "--shape", REPAIR_SHAPE.format(blocks - 2), *REPAIR,
                 "--calibration", str(text), "--output", str(pruned)]
            )  # fmt: skip
            shutil.rmtree(pruned)
        figures["cut"] = cut_times(scratch / "24-blocks", scratch)
        save("streaming", {"samples": SAMPLES, "length": LENGTH} | figures)


if __name__ == "__main__":
    main()
