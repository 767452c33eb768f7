"""Recipes at equal tokens and minutes, and a dynamic mix against a constant one.

    SHEARLING_BENCH_DATA=DIR python benchmarks/healing.py [--only NAME,...] [--scratch DIR]
        [--speed]

SmolLM2-135M without six of its 30 blocks, repaired (`prune --layers 24`, by `repair`), is healed on
the seven RedPajama samples, sequences of 512 tokens. Writes results/healing.json (recipes) and
results/mix.json (mixes), run by run, so that it can be stopped and taken up again; `--scratch`
keeps the store and the models. `--speed` times a step of each recipe instead, in turns: minutes of
runs that shared the machine with others do not compare. Needs DIR, which holds redpajama/*.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, save, source_directory, text_file
from shearling.train.log import read

LENGTH, BATCH = 512, 2
TOKENS = 65_536
COMMON = (
    f"batch={BATCH}", "warmup=0.1", "eval_every=8", "eval_sequences=4", "save_every=100000",
)  # fmt: skip
TEACH = ("--recipe", "distill", "--teacher", "SOURCE")
RECIPES: dict[str, tuple[str, ...]] = {
    "CPT": ("--recipe", "cpt", "lr=2e-4"),
    "LoRA": ("--recipe", "lora", "lr=1e-3"),
    "CPT then LoRA": ("--recipe", "cpt-then-lora", "lr=2e-4"),
    "distillation": (*TEACH, "lr=2e-4"),
    "distillation + states": (*TEACH, "lr=2e-4", "hidden_share=2"),
    "distillation + states + text": (*TEACH, "lr=2e-4", "hidden_share=2", "text_share=0.5"),
}
MIXES: dict[str, tuple[str, ...]] = {
    "constant": RECIPES["CPT"],  # proportional to the domains' sizes
    "dynamic": (
        "--recipe", "cpt", "lr=2e-4", "mix=dynamic", "update_every=8", "--reference", "REFERENCE"
    ),
}  # fmt: skip


def main() -> None:
    """Run what has not been run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", help="runs to make, separated by commas")
    parser.add_argument("--scratch", type=Path, help="where to keep what is made")
    parser.add_argument("--speed", action="store_true", help="time a step of each recipe")
    arguments = parser.parse_args()
    only = arguments.only.split(",") if arguments.only else [*RECIPES, *MIXES]
    with tempfile.TemporaryDirectory() as temporary:
        scratch = arguments.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        words = _prepare(scratch)
        if arguments.speed:
            seconds = _speed(words, Path(temporary))
            timed = {"seconds_a_step": seconds, "tokens_a_step": BATCH * LENGTH}
            save("healing", timed | {"runs": list(_runs("healing").values())})
            return
        for file, runs in (("healing", RECIPES), ("mix", MIXES)):
            for name in runs:
                if name in only:
                    _run(file, name, runs[name], scratch, words)


def _prepare(scratch: Path) -> dict[str, str]:
    """The cut model, the store and the source's own losses, made unless they are there."""
    store, model, reference = scratch / "store", scratch / "cut", scratch / "reference.json"
    source = str(source_directory())
    c4 = text_file("redpajama/c4.jsonl", Path())
    if not (store / "store.json").exists():
        files = sorted(str(file) for file in c4.parent.glob("*.jsonl"))
        _shearling(
            "pack", *files, "--tokenizer", source, "--output", str(store), "--length", str(LENGTH),
            "--held-out", "0.05",
        )  # fmt: skip
    if not model.exists():
        _shearling(
            "prune", source, "--layers", "24", "--by", "repair", "--calibration", str(c4),
            "--copies", "0", "--written", "0", "--output", str(model),
        )  # fmt: skip
    if not reference.exists():
        _shearling(
            "reference", source, "--store", str(store), "--sequences", "4", "--output",
            str(reference),
        )  # fmt: skip
    return {
        "SOURCE": source, "REFERENCE": str(reference), "MODEL": str(model), "STORE": str(store),
    }  # fmt: skip


def _run(
    file: str, name: str, settings: tuple[str, ...], scratch: Path, words: dict[str, str]
) -> None:
    if name in _runs(file):
        return
    output = scratch / "-".join(word.strip("-") for word in settings)
    if not (output / "config.json").exists():  # else the same run has another name as well
        options = [words.get(word, word) for word in settings]
        _shearling(
            "heal", words["MODEL"], "--data", words["STORE"], "--tokens", str(TOKENS),
            "--output", str(output), *options, *COMMON,
        )  # fmt: skip
    record = _record(name, settings, output, json.loads(Path(words["REFERENCE"]).read_text()))
    runs = _runs(file) | {name: record}  # read again: another may have run beside this one
    save(file, {"runs": list(runs.values())})


def _speed(words: dict[str, str], scratch: Path, turns: int = 3) -> dict[str, float]:
    """Median seconds of a step of each recipe of one phase, taken in turns."""
    import torch

    from shearling.data.store import Store
    from shearling.engine.products import fast_products
    from shearling.model.checkpoint import Checkpoint
    from shearling.train.options import parse
    from shearling.train.setup import Training, prepared, trainer

    torch.set_num_threads(2)
    model, teacher = Checkpoint.open(words["MODEL"]), Checkpoint.open(words["SOURCE"])
    store = Store.open(Path(words["STORE"]))
    trainers = {}
    for name, settings in RECIPES.items():
        if name == "CPT then LoRA":
            continue
        pairs = [word for word in settings if "=" in word] + list(COMMON)
        options = parse(settings[1], TOKENS, pairs)
        training = Training(model, store, options, teacher)
        trainers[name] = trainer(training, prepared(training, None), scratch / name)
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for turn in range(turns + 1):  # the first warms up
        for name, running in trainers.items():
            started = time.perf_counter()
            with fast_products():
                running.advance()
            if turn:
                times[name].append(time.perf_counter() - started)
    found = {name: round(statistics.median(taken), 3) for name, taken in times.items()}
    return found | {"CPT then LoRA": round((found["CPT"] + found["LoRA"]) / 2, 3)}


def _runs(file: str) -> dict[str, dict[str, Any]]:
    """What is there, by name."""
    path = RESULTS / f"{file}.json"
    return (
        {run["name"]: run for run in json.loads(path.read_text())["runs"]} if path.exists() else {}
    )


def _record(
    name: str, settings: tuple[str, ...], output: Path, reference: dict[str, Any]
) -> dict[str, Any]:
    """Held-out losses over tokens and seconds of training, over all phases."""
    points: list[dict[str, Any]] = []
    tokens, seconds = 0, 0.0
    for phase in sorted(path for path in (output / "healing").iterdir() if path.is_dir()):
        spent = 0.0
        for record in read(phase):
            spent = record.get("seconds", spent)
            if record["kind"] == "eval" and (record["step"] or not points):
                points.append(record | {"tokens": tokens + record["tokens"], "at": seconds + spent})
        tokens, seconds = points[-1]["tokens"], seconds + spent
    domains = list(points[0]["losses"])
    return {
        "name": name, "recipe": " ".join(settings),
        "tokens": [point["tokens"] for point in points],
        "seconds": [round(point["at"], 1) for point in points],
        "loss": [round(sum(p["losses"].values()) / len(domains), 4) for p in points],
        "losses": {d: [round(p["losses"][d], 4) for p in points] for d in domains},
        "weights": {d: [round(p["weights"][d], 4) for p in points] for d in domains},
        "reference": {d: round(reference["losses"][d], 4) for d in domains},
    }  # fmt: skip


def _shearling(*arguments: str) -> None:
    subprocess.run(["shearling", *arguments], check=True)


if __name__ == "__main__":
    main()
