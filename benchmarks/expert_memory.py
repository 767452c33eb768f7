"""Memory of cutting and repairing a mixture: what a dry run says beforehand, and what it takes.

Qwen3-30B-A3B scaled down (3 blocks of 48, 32 experts of 128, half of every width), random weights,
cut to three quarters of its experts and repaired block by block, in a process of its own. What that
holds at its peak, beyond what it held when everything was imported, is compared with what
``shearling prune --dry-run`` says. The same is then said of the true geometry, of which there are
only the headers of a sparse file, on a GPU of which it may use 24 GB; there need be none.

    python benchmarks/expert_memory.py [directory for about 1 GB of scratch]

writes results/expert_memory.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig

from common import save
from shearling.engine.card import Card
from shearling.engine.peak import Peak
from shearling.engine.place import Wish, on_card
from shearling.files.writer import new_directory, write_json, write_weights
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.plan import parse_shape
from shearling.pruning.run import repair_need
from shearling.pruning.text import CalibrationText
from shearling.table.families import family_of

SAMPLES, LENGTH = 8, 128
MEMORY = 24 * 10**9
TRUE = {
    "vocab_size": 151936, "hidden_size": 2048, "moe_intermediate_size": 768,
    "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "tie_word_embeddings": False, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "max_position_embeddings": 40960,
}  # fmt: skip
SMALL = TRUE | {
    "vocab_size": 9496, "hidden_size": 1024, "moe_intermediate_size": 384,
    "intermediate_size": 3072, "num_hidden_layers": 3, "num_attention_heads": 16,
    "num_key_value_heads": 2, "num_experts": 32, "num_experts_per_tok": 2,
}  # fmt: skip
# Runs a command once all that it imports is there, and says what it holds beyond that, by stage.
CHILD = """
import json, re, sys
from contextlib import contextmanager
import transformers
from transformers.models.qwen3_moe import modeling_qwen3_moe
import shearling.commands.prune, shearling.pruning.prune, shearling.pruning.cut
import shearling.files.terminal as terminal
from shearling.cli import app

def held(key):
    return int(re.search(key + r":\\s*(\\d+)", open("/proc/self/status").read())[1]) << 10

stage, peaks = "opening", {}
def note(following, done=0, total=0):
    global stage
    peaks[stage] = max(peaks.get(stage, 0), held("VmHWM"))
    stage = following
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM begins anew

@contextmanager
def bars(*_, **__):
    yield note

terminal.progress_bars, base = bars, held("VmRSS")
app(sys.argv[1:], standalone_mode=False)
note("")
print("PEAKS", json.dumps({"imported": base} | {name: peak - base for name, peak in peaks.items()}))
"""


def model(directory: Path, sizes: dict[str, Any], *, weights: bool = True) -> Path:
    """Write a mixture in bfloat16, a block at a time; without weights, sparse files."""
    config = Qwen3MoeConfig(**sizes, architectures=["Qwen3MoeForCausalLM"], dtype="bfloat16")
    family = family_of("qwen3_moe", "the benchmark's model")
    shapes = family.layout(config).tensors(family.shape(config))
    generator = torch.Generator().manual_seed(0)

    def load(names: list[str]) -> dict[str, torch.Tensor]:
        return {
            n: (0.02 * torch.randn(shapes[n], generator=generator)).to(torch.bfloat16)
            for n in names
        }

    with new_directory(directory) as staging:
        bytes_of = {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}
        if weights:
            write_weights(staging, bytes_of, load, shard_bytes=10**8)
        else:
            sparse_files(staging, shapes)
        write_json(staging / "config.json", config.to_dict())
        count = sizes["vocab_size"]
        words = {f"w{i}": i for i in range(count - 1)} | {"?": count - 1}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(staging)
    return directory


def sparse_files(directory: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Files of true headers and zeros, one for each block, which take no room on disk."""
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        block = name.split(".")[2] if ".layers." in name else "outside"
        shards.setdefault(f"model-{block}.safetensors", {})[name] = shape
    for file, tensors in shards.items():
        header, at = {}, 0
        for name, shape in tensors.items():
            end = at + 2 * torch.Size(shape).numel()
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (directory / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + at)
    files = {name: file for file, tensors in shards.items() for name in tensors}
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})


def python(*arguments: str) -> str:
    """What a Python of its own prints."""
    done = subprocess.run(
        [sys.executable, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def measured_and_said(scratch: Path) -> dict[str, Any]:
    """The small model: cut, and asked about."""
    text = scratch / "text.txt"
    text.write_text(" ".join(f"w{i * 7919 % 9495}" for i in range(SAMPLES * LENGTH + 100)))
    small = model(scratch / "small", SMALL)
    asked = ["prune", str(small), "--shape", "experts=24", "--stream", "--copies", "1"]
    asked += ["--samples", str(SAMPLES), "--length", str(LENGTH), "--calibration", str(text)]
    asked += ["--output", str(scratch / "cut")]
    said = json.loads(python("-m", "shearling.cli", *asked, "--dry-run", "--json"))["memory"]
    by_stage = json.loads(python("-c", CHILD, *asked).rsplit("PEAKS", 1)[1])
    imported = by_stage.pop("imported")
    peak = max(by_stage.values())
    source = Checkpoint.open(small)
    return {
        "shape": dict(source.shape), "parameters": source.parameters, "bytes": source.bytes,
        "samples": SAMPLES, "length": LENGTH, "said": said, "imported_bytes": imported,
        "measured": {"peak_bytes": peak, "by_stage": by_stage},
        "said_over_measured": round(said["peak_bytes"] / peak, 3),
    }  # fmt: skip


def said_of_the_true_one(scratch: Path) -> dict[str, Any]:
    """Qwen3-30B-A3B to 96 experts, default calibration, on a card of 24 GB."""
    text = scratch / "text.txt"
    source = Checkpoint.open(model(scratch / "true", TRUE, weights=False))
    calibration, _ = CalibrationText(file=text).settled(
        source, Wish(device="cpu", stream=True), lambda sentence: None, 1
    )
    need = repair_need(source, calibration)
    card = Card(torch.device("cuda", 0), "a card of 24 GB", MEMORY, MEMORY)
    wish = Wish(memory=MEMORY)
    place = on_card(source, card, torch.bfloat16, wish, need)
    after = parse_shape("experts=96", source)
    scored = calibration.samples * calibration.length
    said = Peak.of(source, place, need, after, scored=scored, repaired=True)
    return {
        "shape": dict(source.shape), "parameters": source.parameters, "bytes": source.bytes,
        "after": after["experts"], "memory": MEMORY, "place": place.lines()[0],
        "weights": place.weights, "states": place.states, "batch_tokens": place.batch_tokens,
        "text_tokens": need.tokens, "said": said.as_json(), "line": said.line(),
    }  # fmt: skip


def main() -> None:
    """Measure, compare, write."""
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        scratch = Path(folder)
        figures = {"small": measured_and_said(scratch), "true": said_of_the_true_one(scratch)}
    save("expert_memory", figures)


if __name__ == "__main__":
    main()
