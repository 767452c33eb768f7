"""Ways to one shape at equal tokens: gates from open, from scores, top-k gates, scores alone.

    SHEARLING_BENCH_DATA=DIR python benchmarks/learning.py [--scratch DIR] [--only NAME+...]

SmolLM2-135M to 0.8 of its block parameters on all four axes, on the seven RedPajama samples. Gates
are trained for half of the tokens and the cut model healed for the other half; scores leave all of
them to healing. Writes results/learning.json, run by run. Needs DIR, which holds redpajama/*.jsonl.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, save, source_directory, text_file
from shearling.train.log import read

LENGTH, TOKENS = 512, 65_536
SHAPE = "layers=28,hidden=544,heads=6,mlp=1472"
COMMON = ("batch=2", "lr=2e-4", "eval_every=8", "eval_sequences=4", "save_every=100000")
RUNS: dict[str, tuple[str, ...]] = {  # the paper's mix is dynamic; here all have the same
    "gates, all open": ("--recipe", "sheared", "mix=proportional"),
    "gates from scores": ("--recipe", "warm"),
    "scores": ("--recipe", "scores"),
    "top-k from scores": ("--recipe", "warm", "gates=top-k"),
}


def main() -> None:
    """Run what has not been run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", help="runs to make, joined by +")
    parser.add_argument("--scratch", type=Path, help="where to keep what is made")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = arguments.scratch or Path(temporary)
        store, source = scratch / "store", str(source_directory())
        if not (store / "store.json").exists():
            files = sorted(map(str, text_file("redpajama", Path()).glob("*.jsonl")))
            _shearling(
                "pack", *files, "--tokenizer", source, "--output", str(store), "--length",
                str(LENGTH), "--held-out", "0.05",
            )  # fmt: skip
        for name, settings in RUNS.items():
            if arguments.only is None or name in arguments.only.split("+"):
                _run(name, settings, source, store, scratch)


def _run(name: str, settings: tuple[str, ...], source: str, store: Path, scratch: Path) -> None:
    file = RESULTS / "learning.json"
    result = json.loads(file.read_text()) if file.exists() else {"runs": []}
    if name in [run["name"] for run in result["runs"]]:
        return
    gated = name != "scores"
    output = scratch / name.replace(" ", "-").replace(",", "")
    half = str(TOKENS // 2 if gated else TOKENS)
    data = ("--data", str(store), "--tokens", half, *COMMON)
    _shearling("learn", source, "--shape", SHAPE, "--output", str(output), *settings, *data)
    logs = [output / "learning" / "gates" if gated else output / "healing" / "cpt"]
    if gated:
        healed = output.with_name(f"{output.name}-healed")
        _shearling("heal", str(output), "--output", str(healed), "warmup=0.1", *data)
        logs.append(healed / "healing" / "cpt")
    run = {"name": name, "recipe": " ".join(settings)} | _curve(logs)
    save("learning", {"shape": SHAPE, "length": LENGTH, "runs": [*result["runs"], run]})


def _curve(logs: list[Path]) -> dict[str, Any]:
    tokens, losses, before = [], [], 0
    for log in logs:
        looks = [record for record in read(log) if record["kind"] == "eval"]
        tokens += [before + look["tokens"] for look in looks]
        losses += [round(sum(look["losses"].values()) / len(look["losses"]), 4) for look in looks]
        before = tokens[-1]
    return {"tokens": tokens, "loss": losses}


def _shearling(*arguments: str) -> None:
    subprocess.run(["shearling", *arguments], check=True)


if __name__ == "__main__":
    main()
