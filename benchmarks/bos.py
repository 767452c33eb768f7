"""What a BOS before every window is worth: Gemma 3 270M, cut by default and repaired.

    SHEARLING_BENCH_MODEL=gemma.gguf SHEARLING_BENCH_DATA=DIR python benchmarks/bos.py \\
        [--samples 64] [--only source|bos|no-bos]

The model as it is, and the same without 15 % of its parameters (`prune --params 0.85x`), chosen and
repaired on windows that begin with BOS and on windows that do not. Each is measured on 12 windows
of 512 tokens of WikiText-2 and of c4 documents that calibration never saw, behind BOS and without.
Rows that are known are not run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, first_nine_tenths, save, source_directory, text_file
from shearling.evaluate.perplexity import Windows, evaluate
from shearling.model.checkpoint import Checkpoint
from shearling.model.manifest import read_manifest
from shearling.pruning.prune import Running, Size, prune
from shearling.pruning.text import CalibrationText

PARAMS, WINDOW, WINDOWS = "0.85x", 512, 12
SIDES = {"bos": True, "no-bos": False}


def main() -> None:
    """Measure what has not been measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--only", choices=[*SIDES, "source"])
    arguments = parser.parse_args()
    for name in ("source", *SIDES):
        known = _known()
        if arguments.only in (None, name) and all(row["calibrated"] != name for row in known):
            row = _row(name, arguments.samples)
            save("bos", {"rows": [*known, row]})


def _known() -> list[dict[str, Any]]:
    file = RESULTS / "bos.json"
    return json.loads(file.read_text())["rows"] if file.exists() else []


def _row(name: str, samples: int) -> dict[str, Any]:
    """The source, or a cut of it, with its perplexities."""
    source = Checkpoint.open(source_directory())
    with tempfile.TemporaryDirectory() as place:
        c4 = text_file("redpajama/c4.jsonl", Path(place))
        lines = c4.read_text(encoding="utf-8").splitlines(keepends=True)
        held = Path(place) / "c4.jsonl"
        held.write_text("".join(lines[len(lines) * 9 // 10 :]), encoding="utf-8")
        texts = {"c4": held, "wikitext2": text_file("wikitext2-test.txt", Path(place))}
        row: dict[str, Any] = {"calibrated": name, "parameters": source.parameters}
        path = source.path
        if name in SIDES:
            path = Path(place) / "cut"
            started, processor = time.perf_counter(), time.process_time()
            text = CalibrationText(
                file=first_nine_tenths(c4, Path(place)), samples=samples, bos=SIDES[name]
            )
            cut = prune(
                source, path, Size(params=PARAMS), calibration=text, running=Running(progress=told)
            )
            options = (read_manifest(path) or {})["options"]
            row |= {
                "parameters": cut.parameters, "shape": str(cut.shape), "samples": samples,
                "removed": options.get("removed"),
                "divergence": options["repair"]["divergence"],
                "seconds": round(time.perf_counter() - started),
                "processor_seconds": round(time.process_time() - processor),
            }  # fmt: skip
        for text_name, file in texts.items():
            for side, bos in SIDES.items():
                measured = evaluate(path, file, Windows(WINDOW, WINDOWS, bos=bos))
                row[f"{text_name}, {side}"] = round(measured["perplexity"], 2)
        return row


_stages: list[str] = []


def told(stage: str, done: float, total: float, /) -> None:
    """Print a stage when it begins."""
    if stage not in _stages:
        _stages.append(stage)
        print(f"{time.process_time():7.0f} processor seconds: {stage}", flush=True)


if __name__ == "__main__":
    main()
