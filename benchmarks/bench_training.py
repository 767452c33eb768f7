"""The loop against a bare PyTorch one: same model, batches, optimiser and machine, in turns.

    SHEARLING_BENCH_DATA=DIR python benchmarks/bench_training.py [steps of a turn]

SmolLM2-135M, sequences of 512 tokens, four a step. The bare loop is forward, cross-entropy,
backward, clipping and AdamW, its batches in memory already. Writes results/training.json. Needs
DIR, which holds redpajama/c4.jsonl.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from common import save, source_directory, text_file
from shearling.data.pack import PackPlan, pack
from shearling.data.store import Store
from shearling.engine.products import fast_products
from shearling.model.checkpoint import Checkpoint
from shearling.train import weights
from shearling.train.build import loaded
from shearling.train.loop import Trainer
from shearling.train.objective import Objective
from shearling.train.optimiser import groups
from shearling.train.options import Options
from shearling.train.parallel import World

BATCH, LENGTH, TURNS = 4, 512, 4


def main() -> None:
    """Take turns, and write the ratio down."""
    torch.set_num_threads(2)
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    source = Checkpoint.open(source_directory())
    with tempfile.TemporaryDirectory() as scratch:
        store = _store(source, Path(scratch))
        trainer = _trainer(source, store, Path(scratch), steps)
        bare, optimiser = _bare(source, trainer.options)
        ids_NS = trainer._reader.read("train", [(store.domains[0], row) for row in range(BATCH)])[0]
        times: dict[str, list[float]] = {"ours": [], "bare": [], "bare, our products": []}
        reading = 0.0
        for turn in range(TURNS + 1):  # the first warms up
            started = time.perf_counter()
            with fast_products():
                for _ in range(steps):
                    trainer.advance()
            ours = time.perf_counter() - started
            started = time.perf_counter()
            rows = trainer.mixture.next(trainer.weights.current)
            trainer._reader.read("train", rows)
            reading = max(reading, time.perf_counter() - started) if turn else 0.0
            plain = _timed(bare, optimiser, ids_NS, steps)
            with fast_products():
                fast = _timed(bare, optimiser, ids_NS, steps)
            if turn:
                for name, seconds in zip(times, (ours, plain, fast), strict=True):
                    times[name].append(seconds / steps)
    seconds = {name: statistics.median(found) for name, found in times.items()}
    ratios = {
        name: statistics.median(b / a for a, b in zip(times["ours"], times[name], strict=True))
        for name in ("bare", "bare, our products")
    }
    save("training", {
        "batch": BATCH, "length": LENGTH, "steps_of_a_turn": steps, "turns": TURNS,
        "seconds_a_step": seconds, "tokens_per_s": BATCH * LENGTH / seconds["ours"],
        "throughput_over": ratios, "share_of_reading": reading / seconds["ours"],
    })  # fmt: skip


def _store(source: Checkpoint, scratch: Path) -> Store:
    file = text_file("redpajama/c4.jsonl", Path())
    plan = PackPlan.of([str(file)], source.tokenizer(), source.name, length=LENGTH)
    pack(plan, scratch / "store")
    return Store.open(scratch / "store")


def _trainer(source: Checkpoint, store: Store, scratch: Path, steps: int) -> Trainer:
    options = Options(
        tokens=BATCH * LENGTH * steps * (TURNS + 1), batch=BATCH, micro=BATCH, warmup=0.0
    )
    sizes = {domain: len(store.sequences(domain)) for domain in store.domains}
    model = loaded(source, World()).eval()
    return Trainer(
        Objective(model, plain_head=True), store, options, weights.build("proportional", sizes),
        scratch / "run", {}, World(),
    )  # fmt: skip


def _bare(source: Checkpoint, options: Options) -> tuple[Any, torch.optim.Optimizer]:
    model: Any = loaded(source, World()).eval()
    optimiser = torch.optim.AdamW(groups(model, 0.1), lr=options.lr, betas=options.betas)
    return model, optimiser


def _timed(model: Any, optimiser: torch.optim.Optimizer, ids_NS: Any, steps: int) -> float:
    started = time.perf_counter()
    for _ in range(steps):
        logits = model(input_ids=ids_NS, use_cache=False).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids_NS[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        loss.item()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
