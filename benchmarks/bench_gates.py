"""A training step with gates against the same step without: same model, batch, machine, in turns.

    python benchmarks/bench_gates.py [turns]

SmolLM2-135M, gates on all four axes, sequences of 512 tokens, one and four a step, both loops the
package's own. Writes results/gates.json.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch

from common import save, source_directory
from shearling.engine.products import fast_products
from shearling.gates.attach import attach
from shearling.gates.bank import GateBank
from shearling.gates.learner import Learner
from shearling.model.checkpoint import Checkpoint
from shearling.train.build import loaded
from shearling.train.objective import Objective
from shearling.train.optimiser import groups
from shearling.train.parallel import World

LENGTH = 512
SHAPE = {"layers": 28, "hidden": 544, "heads": 6, "mlp": 1400}


def main() -> None:
    """Take turns, and write the ratios down."""
    torch.set_num_threads(2)
    turns = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    source = Checkpoint.open(source_directory())
    plain, gated = _loop(source, gates=False), _loop(source, gates=True)
    result: dict[str, Any] = {"length": LENGTH, "turns": turns, "shape": SHAPE, "batches": []}
    for batch in (1, 4):
        ids_BS = torch.randint(source.shape["vocab"], (batch, LENGTH))
        times: dict[str, list[float]] = {"plain": [], "gated": []}
        for turn in range(turns + 1):  # the first warms up
            pair = {"plain": plain, "gated": gated}
            for name in sorted(pair, reverse=turn % 2 == 1):
                started = time.perf_counter()
                _step(*pair[name], ids_BS, turn)
                if turn:
                    times[name].append(time.perf_counter() - started)
        ratios = [b / a for a, b in zip(times["plain"], times["gated"], strict=True)]
        result["batches"].append(
            {
                "batch": batch, "ratio": statistics.median(ratios), "ratios": sorted(ratios),
                "seconds": {name: statistics.median(found) for name, found in times.items()},
            }
        )  # fmt: skip
        print(result["batches"][-1], flush=True)
    save("gates", result)


def _loop(source: Checkpoint, *, gates: bool) -> tuple[Objective, Any]:
    model = loaded(source, World()).eval()
    learner = None
    if gates:
        bank = GateBank(source.layout, source.shape, source.shape.with_(**SHAPE))
        attach(source, model, bank)
        learner = Learner(bank, constraint="projection", rise=100)
    objective = Objective(model, plain_head=True, learner=learner)
    own = groups(objective, 0.0) + (learner.groups() if learner else [])
    return objective, torch.optim.AdamW(own, lr=1e-5, betas=(0.9, 0.95))


def _step(objective: Objective, optimiser: torch.optim.Optimizer, ids_BS: Any, step: int) -> None:
    """What :class:`shearling.train.loop.Trainer` does in a step."""
    learner = objective.learner
    with fast_products():
        if learner is not None:
            learner.draw(step)
        loss = objective(ids_BS, ids_BS) / ids_BS.numel()
        loss.backward()
        if learner is not None:
            learner.gather(step, World())
        torch.nn.utils.clip_grad_norm_(objective.model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if learner is not None:
            learner.settle(step + 1)
            learner.record(step + 1)
        loss.item()


if __name__ == "__main__":
    main()
