"""Zero-shot tasks of SmolLM2-135M and of two models cut from it, in full.

    SHEARLING_BENCH_DATA=DIR python benchmarks/zeroshot.py [--only NAME,...] [--scratch DIR]
        [--limit N] [--depth DIR] [--both DIR]

arc_easy, openbookqa and piqa from DIR/zeroshot, asked as ARC's questions are, of the dense model,
of one with 24 of its 30 blocks, and of one that lost as many parameters (15.8 %) from its depth and
its MLPs; both repaired. The cuts are calibrated on 64 windows of 256 tokens from the first nine
tenths of DIR/redpajama/c4.jsonl, and are made into --scratch unless directories are given. What has
been measured is not measured again: a model's row is written down as it ends, and a run that was
stopped goes on with the task it was at. --limit is for trials and saves nothing. Needs lm-eval.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, first_nine_tenths, save, source_directory, text_file

TASKS = ("arc_easy", "openbookqa", "piqa")
MODELS = ("dense", "depth", "both")
CUTS = {
    "depth": ["--layers", "24", "--copies", "0", "--written", "0"],
    "both": ["--shape", "layers=27,mlp=1308", "--copies", "3", "--written", "64"],
}
Z95 = 1.959964  # of a standard normal, for an interval of 95 %
COMPARISON: dict[str, Any] = {  # what the rows are, for `shearling report` (docs/files.md)
    "kind": "comparison",
    "title": "Zero-shot accuracy after cuts without training",
    "note": "Length-normalised errors of arc_easy, openbookqa and piqa, all questions.",
    "panel": ["what"],
    "panel_name": "{what}",
    "label": "model",
    "baseline": "dense",
    "measures": {f"{task}_error": f"error on {task}" for task in TASKS},
    "columns": {
        "parameters": "parameters", "average": "mean acc_norm",
        **{f"{task}_interval": f"± {task} (95 %)" for task in TASKS},
    },
}  # fmt: skip


def main() -> None:
    """Measure the models that have not been measured, then write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", help=f"models, separated by commas: {', '.join(MODELS)}")
    parser.add_argument("--limit", type=int, help="questions a task, for a trial: nothing is saved")
    parser.add_argument("--scratch", type=Path, help="where cuts are made, and kept")
    for name in CUTS:
        parser.add_argument(f"--{name}", type=Path, help="a model made before")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",") if arguments.only else list(MODELS)
    if unknown := sorted(set(chosen) - set(MODELS)):
        raise SystemExit(f"--only {','.join(unknown)}: the models are {', '.join(MODELS)}")
    with tempfile.TemporaryDirectory() as place:
        scratch = arguments.scratch or Path(place)
        for name in chosen:
            known = _known()
            if arguments.limit is None and any(row["model"] == name for row in known):
                continue
            model = getattr(arguments, name, None) or _model(name, scratch)
            row = _row(name, model, _measured(model, arguments.limit))
            if arguments.limit is not None:
                print(json.dumps(row, indent=2))
                continue
            save("zeroshot", COMPARISON | {"rows": sorted([*known, row], key=_order)})


def _known() -> list[dict[str, Any]]:
    """Rows of models that were measured before."""
    file = RESULTS / "zeroshot.json"
    return json.loads(file.read_text())["rows"] if file.exists() else []


def _order(row: dict[str, Any]) -> int:
    return MODELS.index(row["model"])


def _model(name: str, scratch: Path) -> Path:
    """The dense model, or a cut of it, made if it is not there."""
    source = source_directory()
    output = scratch / f"smollm2-{name}"
    if name == "dense" or output.is_dir():
        return source if name == "dense" else output
    scratch.mkdir(parents=True, exist_ok=True)
    text = text_file("redpajama/c4.jsonl", Path("c4.jsonl"))
    calibration = first_nine_tenths(text, scratch)
    _shearling("prune", source, *CUTS[name], "--calibration", calibration, "--output", output)
    return output


def _measured(model: Path, limit: int | None) -> dict[str, Any]:
    """The tasks of one model, in a process of its own."""
    files = [text_file(f"zeroshot/{task}.jsonl", Path(f"{task}.jsonl")) for task in TASKS]
    tasks = ",".join(str(file) for file in files)
    few = () if limit is None else ("--limit", limit)
    return json.loads(_shearling("eval", model, "--tasks", tasks, *few, "--json"))


def _row(name: str, model: Path, found: dict[str, Any]) -> dict[str, Any]:
    from shearling.model.checkpoint import Checkpoint

    row: dict[str, Any] = {
        "model": name,
        "parameters": Checkpoint.open(model).parameters,
        "average": round(found["average"], 4),
        "fingerprint": found["model"]["fingerprint"],
        "tasks": found["tasks"],
    }
    if name != "dense":
        row["what"] = " ".join(CUTS[name])
    for task in TASKS:
        metrics = found["tasks"][task]["metrics"]
        row[f"{task}_error"] = round(1 - metrics["acc_norm"], 4)
        row[f"{task}_interval"] = round(Z95 * metrics["acc_norm_stderr"], 4)
    return row


def _shearling(*arguments: object) -> str:
    command = [sys.executable, "-m", "shearling.cli", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[2:4])} failed")
    return done.stdout


if __name__ == "__main__":
    main()
