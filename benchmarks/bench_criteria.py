"""Perplexity of every single-block removal: the wavefront against a naive loop.

The naive loop works the way the released script of Shortened LLaMA does: for every block the
pruned model is built anew from the checkpoint, then run on one sequence after the other. It is
taken in thirds with the wavefront in between, so that drift of the machine falls on both.

    python benchmarks/bench_criteria.py

writes results/criteria.json. SmolLM2-135M, 10 x 128 tokens, float32.
"""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common import save, source_directory, text_file
from shearling.commands.demo_text import write_demo_text
from shearling.data.documents import documents
from shearling.data.text import calibration_windows
from shearling.engine.place import Place
from shearling.engine.stream import BlockStream
from shearling.model.checkpoint import Checkpoint
from shearling.scoring.score import score_tokens

SAMPLES, LENGTH = 10, 128


def naive_perplexity(path: Path, ids_NS: torch.Tensor, removed: int) -> float:
    """Build the model without one block from its checkpoint, run it with batch 1."""
    config = AutoConfig.from_pretrained(path)
    original = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    config.num_hidden_layers -= 1
    pruned = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    kept = [block for block in range(len(original.model.layers)) if block != removed]
    state = original.state_dict()
    for target, source in enumerate(kept):
        prefix = f"model.layers.{source}."
        weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        pruned.model.layers[target].load_state_dict(weights)
    outside = {k: v for k, v in state.items() if not k.startswith("model.layers.")}
    pruned.load_state_dict(outside, strict=False)
    pruned.eval()
    nll = []
    with torch.no_grad():
        for ids_S in ids_NS:
            logits = pruned(ids_S[None]).logits
            nll.append(torch.nn.functional.cross_entropy(logits[0, :-1], ids_S[1:]))
    return math.exp(torch.stack(nll).double().mean())


def main() -> None:
    path = source_directory()
    checkpoint = Checkpoint.open(path)
    with tempfile.TemporaryDirectory() as scratch:
        text = text_file("redpajama/c4.jsonl", write_demo_text(Path(scratch))[0])
        ids_NS = calibration_windows(
            documents(text), checkpoint.tokenizer(), samples=SAMPLES, length=LENGTH, seed=0
        ).ids_NS
    depth = checkpoint.shape["layers"]
    naive: list[float] = []
    naive_seconds, wave_seconds = 0.0, []
    thirds = [range(depth * i // 3, depth * (i + 1) // 3) for i in range(3)]
    for third in thirds:
        started = time.perf_counter()
        naive += [naive_perplexity(path, ids_NS, block) for block in third]
        naive_seconds += time.perf_counter() - started
        started = time.perf_counter()
        held = score_tokens(BlockStream(checkpoint, Place.cpu()), "perplexity", ids_NS)
        wave_seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
    streamed = score_tokens(BlockStream(checkpoint, Place.cpu(streamed=True)), "perplexity", ids_NS)
    streamed_seconds = time.perf_counter() - started

    def worst(values: tuple[float, ...]) -> float:
        return max(abs(a - b) / b for a, b in zip(values, naive, strict=True))

    wave = sorted(wave_seconds)[1]
    save(
        "criteria",
        {
            "text": text.name,
            "samples": SAMPLES,
            "length": LENGTH,
            "naive_seconds": round(naive_seconds, 1),
            "wavefront_seconds": [round(s, 1) for s in wave_seconds],
            "streamed_seconds": round(streamed_seconds, 1),
            "speedup": round(naive_seconds / wave, 2),
            "largest_relative_difference": {
                "in_memory": worst(held.values),
                "streamed": worst(streamed.values),
            },
            "same_order": held.order
            == streamed.order
            == tuple(sorted(range(depth), key=naive.__getitem__)),
            "baseline_perplexity": held.baseline_perplexity,
            "perplexity_without_block": [round(v, 3) for v in naive],
        },
    )


if __name__ == "__main__":
    main()
