"""Depth against width, every criterion, with and without repair, at equal parameter counts.

    SHEARLING_BENCH_DATA=DIR python benchmarks/one_shot.py [--only NAME,...] [--repairs KIND,...]

SmolLM2-135M loses 20 % and 40 % of the parameters in its blocks, by whole blocks (24 and 18 of 30
stay) or by MLP neurons (1,126 and 716 of 1,536). Calibration is 64 windows of 256 tokens from the
first nine tenths of c4.jsonl; evaluation the first 12 windows of 512 tokens of its last tenth, and
of WikiText-2. Every cell is a process of its own (seconds and peak memory are its own) and is
written down as it ends, so that the run can be stopped and taken up again. Needs DIR, which holds
redpajama/c4.jsonl and wikitext2-test.txt.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import RESULTS, save, source_directory, text_file

DEPTH = ("repair", "perplexity", "taylor+", "taylor", "magnitude+", "influence", "greedy")
WIDTH = (
    "fisher-energy", "fisher", "energy", "obs", "flap", "wanda-sp", "activation", "taylor",
    "taylor-element", "magnitude-l2", "random",
)  # fmt: skip
SHAPES = {
    ("depth", 20): {"layers": 24}, ("depth", 40): {"layers": 18},
    ("width", 20): {"mlp": 1126}, ("width", 40): {"mlp": 716},
}  # fmt: skip
REPAIRS = ("none", "refit", "refit+copies")


def main() -> None:
    """Run what has not been run, then write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", help="criteria to run, separated by commas")
    parser.add_argument("--repairs", default=",".join(REPAIRS))
    parser.add_argument("--sizes", default="20,40")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        print("CELL " + json.dumps(cell(**json.loads(arguments.cell))))
        return
    file = RESULTS / "one_shot.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    done = {tuple(row[k] for k in ("axis", "removed", "criterion", "repair")) for row in rows}
    only = set(arguments.only.split(",")) if arguments.only else {*DEPTH, *WIDTH, "dense"}
    wanted = [("dense", 0, "dense", "none")] + [
        (axis, int(size), criterion, repair)
        for size in arguments.sizes.split(",")
        for repair in arguments.repairs.split(",")
        for axis, criteria in (("width", WIDTH), ("depth", DEPTH))
        for criterion in criteria
        if criterion in only
    ]
    for key in wanted:
        if key in done:
            continue
        rows.append(_in_a_process(*key))
        save("one_shot", {"rows": rows, "windows": "64 x 256 calibration, 12 x 512 evaluation"})


def _in_a_process(axis: str, removed: int, criterion: str, repair: str) -> dict[str, Any]:
    asked = {"axis": axis, "removed": removed, "criterion": criterion, "repair": repair}
    command = [sys.executable, __file__, "--cell", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.rsplit("CELL ", 1)[1])


def cell(axis: str, removed: int, criterion: str, repair: str) -> dict[str, Any]:
    """One row: choose, repair, run; nothing but the repaired tensors is written to disk."""
    import torch

    from shearling.augment import augment
    from shearling.checkpoint import Checkpoint
    from shearling.oneshot import Calibration, choose
    from shearling.refit import refit
    from shearling.stream import BlockStream
    from shearling.view import cut_view

    source = Checkpoint.open(source_directory())
    row: dict[str, Any] = {
        "axis": axis, "removed": removed, "criterion": criterion, "repair": repair,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        calibration = Calibration(_calibration_file(Path(scratch)))
        if axis == "dense":
            model = _loaded(source, {})
            row["parameters"] = source.parameters
        else:
            after = source.shape.with_(**SHAPES[axis, removed])
            started = time.perf_counter()
            shares = calibration.shares if repair == "refit+copies" else ()
            calibration = replace(calibration, shares=shares)
            choice = choose(
                source, after, by=criterion, calibration=calibration,
                repaired=repair != "none", stream=False,
            )  # fmt: skip
            keep = choice.keep
            row["seconds_choosing"] = round(time.perf_counter() - started, 1)
            replaced = {}
            started = time.perf_counter()
            if repair != "none":
                ids_NS = choice.copies
                if ids_NS is None:
                    blocks = BlockStream(source, resident=True)
                    ids_NS = augment(blocks, calibration.windows(source), shares=shares)
                replaced = refit(source, keep, ids_NS, Path(scratch), stream=False).replaced
            row["seconds_repairing"] = round(time.perf_counter() - started, 1)
            row["peak_mib"] = _peak()
            view = cut_view(source, keep)
            row["parameters"] = view.parameters
            row["kept_layers"] = list(keep.model.get("layers", ()))
            model = _loaded(view, {name: load() for name, load in replaced.items()})
    with torch.inference_mode():
        for name, windows in _evaluation(source.tokenizer()).items():
            row[name] = round(_perplexity(model, windows), 2)
    return row


def _loaded(checkpoint: Any, replaced: dict[str, Any]) -> Any:
    """A stock model holding what a checkpoint, or a view of one, reads."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(checkpoint.config, dtype=torch.float32).eval()
    weights = dict(checkpoint.read(checkpoint.layout.tensors(checkpoint.shape))) | replaced
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    return model


def _calibration_file(scratch: Path) -> Path:
    lines = text_file("redpajama/c4.jsonl", Path()).read_text(encoding="utf-8").splitlines()
    file = scratch / "c4-first-nine-tenths.jsonl"
    file.write_text("\n".join(lines[: len(lines) * 9 // 10]), encoding="utf-8")
    return file


def _evaluation(tokenizer: Any, windows: int = 12, length: int = 512) -> dict[str, Any]:
    """Windows of c4's last tenth (documents joined with EOS), and of WikiText-2."""
    import torch

    ids: list[int] = []
    for line in text_file("redpajama/c4.jsonl", Path()).open(encoding="utf-8"):
        ids += tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
        ids.append(tokenizer.eos_token_id)
    c4 = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    text = text_file("wikitext2-test.txt", Path()).read_text(encoding="utf-8")[:100_000]
    wiki = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    return {
        "c4": c4[-(len(c4) // 10) :][:windows],
        "wikitext2": wiki[: windows * length].view(windows, length),
    }


def _perplexity(model: Any, windows: Any) -> float:
    from shearling.products import fast_products
    from shearling.stream import token_nll

    total = count = 0.0
    with fast_products():
        for ids in windows.split(2):
            nll = token_nll(model(ids, use_cache=False).logits[:, :-1], ids[:, 1:])
            total, count = total + float(nll.double().sum()), count + nll.numel()
    return math.exp(total / count)


def _peak() -> float:
    match = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    return round(int(match[1]) / 1024, 1) if match else 0.0


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main()
