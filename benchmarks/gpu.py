"""What a GPU gives: first that it is right, then how long everything takes, and in how much memory.

    python benchmarks/gpu.py                # every row that has no result yet
    python benchmarks/gpu.py --rows repair,default_prune --again
    python benchmarks/gpu.py --tiny         # the same code on a small model, on a processor too

The models are made at run time: Llama-2-7B's shape with random weights, in bfloat16, written once
to ``--scratch``. Every row has a time limit of its own, and results/gpu.json is written after each,
so that a run that was cut short goes on where it was. Ratios are of figures taken in the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gpu_commands
import gpu_rows as rows

ROWS = rows.ROWS | gpu_commands.ROWS
RESULTS = Path(__file__).parent / "results"


@contextmanager
def at_most(seconds: float) -> Generator[None]:
    """Raise TimeoutError when a row takes longer."""

    def late(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(math.ceil(seconds))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(names: list[str], bench: rows.Bench, output: Path, *, again: bool, limit: float) -> None:
    """Take rows that have no figures yet, as long as there is time."""
    results: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    results |= {"machine": rows.machine()}
    ends = time.perf_counter() + limit
    for name in names:
        row: Callable[[rows.Bench], dict[str, Any]]
        seconds, row = ROWS[name]
        left = ends - time.perf_counter()
        if not again and "error" not in results.get(name, {"error": "none yet"}):
            continue
        if left < 5:
            print(f"no time left for {name}", file=sys.stderr)
            continue
        started = time.perf_counter()
        try:
            with at_most(min(seconds, left)):
                results[name] = row(bench)
        except Exception as error:
            traceback.print_exc()
            results[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
        results[name]["row_seconds"] = round(time.perf_counter() - started, 1)
        print(name, json.dumps(results[name]), flush=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=2) + "\n")
        rows.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default=",".join(ROWS), help="which, separated by commas")
    parser.add_argument("--again", action="store_true", help="take rows again that have figures")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    parser.add_argument("--limit", type=float, default=420, help="seconds for all rows together")
    parser.add_argument("--scratch", type=Path, help="where the 13.5 GB model is put and kept")
    parser.add_argument("--pieces", type=Path, help="a folder with SmolLM2's file, or pieces of it")
    parser.add_argument("--reference", type=Path, help="row smollm2 of a CPU, to compare with")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = options.scratch or Path(folder)
        scratch.mkdir(parents=True, exist_ok=True)
        bench = rows.Bench(scratch, options.tiny, options.pieces, options.reference)
        run(options.rows.split(","), bench, options.output, again=options.again,
            limit=options.limit)  # fmt: skip


if __name__ == "__main__":
    main()
