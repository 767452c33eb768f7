"""The abilities of SmolLM2-135M, and whether they tell it from its own copy with a little noise.

    python benchmarks/abilities.py [--noise 0.01] [--draws 3] [--limit N]

Every weight tensor of a copy has normal noise added, of so many times the tensor's own norm; each
draw is another copy. Written down for each: what is left of the source's abilities
(docs/abilities.md), with the interval of paired differences, and the processor's seconds. --limit
is for trials and saves nothing.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from common import save, source_directory
from shearling.evaluate.abilities.measure import Asking, measure_abilities
from shearling.evaluate.abilities.results import Abilities
from shearling.evaluate.abilities.shares import Share, mean_share, moved, shares
from shearling.model.loading import load_model
from shearling.model.subject import open_subject


def main() -> None:
    """Measure the source, then its copies."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--noise", type=float, default=0.01, help="share of each tensor's norm")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--limit", type=int, help="items of each ability, for a trial")
    arguments = parser.parse_args()
    subject = open_subject(source_directory())
    tokenizer, model = subject.tokenizer(), load_model(subject.path)
    asking = Asking(limit=arguments.limit)
    source, seconds, processor = measured(subject, model, tokenizer, asking)
    print(f"source: {seconds} s, {processor} s of the processor", flush=True)
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    copies = []
    for seed in range(arguments.draws):
        add_noise(model, weights, arguments.noise, seed)
        copy, *_ = measured(subject, model, tokenizer, asking)
        left = shares(source, copy)
        copies.append({"seed": seed, "all": told(mean_share(left)),
                       "moved": moved(source, copy),
                       "abilities": {share.ability: told(share) for share in left}})  # fmt: skip
        print(copies[-1]["all"], flush=True)
    result = {
        "model": subject.name, "threads": torch.get_num_threads(), "seconds": seconds,
        "processor_seconds": processor, "asked_sha256": source.asked_sha256,
        "abilities": {name: summary(one) for name, one in source.to_json()["abilities"].items()},
        "noise": arguments.noise, "copies": copies,
    }  # fmt: skip
    if arguments.limit is None:
        save("abilities", result, shown=False)


def measured(
    subject: Any, model: Any, tokenizer: Any, asking: Asking
) -> tuple[Abilities, float, float]:
    """A model's abilities, seconds, and seconds of the processor."""
    wall, processor = time.perf_counter(), time.process_time()
    file = measure_abilities(subject, model, tokenizer, asking)
    spent = time.perf_counter() - wall, time.process_time() - processor
    return Abilities.from_json(file, Path("abilities.json")), round(spent[0], 1), round(spent[1], 1)


def add_noise(
    model: torch.nn.Module, weights: dict[str, torch.Tensor], share: float, seed: int
) -> None:
    """Make the model a copy of the weights, each with noise of ``share`` times its norm."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data.copy_(weights[name] + noise * (share * weights[name].norm() / noise.norm()))


def told(share: Share) -> dict[str, Any]:
    """A share, its interval, and whether that tells the two models apart."""
    low, high = share.interval
    apart = not low <= 1 <= high
    return {"left": share.left, "interval": [low, high], "difference": share.difference,
            "standard_error": share.error, "told_apart": apart}  # fmt: skip


def summary(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures of an ability without those of its items."""
    return {key: value for key, value in figures.items() if key not in ("losses", "lengths")}


if __name__ == "__main__":
    main()
