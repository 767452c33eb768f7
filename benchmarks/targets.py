"""Whether targets are met: a planned shape is timed again, and memory counted on what is written.

    python benchmarks/targets.py [--engines transformers,llama.cpp] [--speeds 1.15x,1.3x,1.6x]
        [--footprints 0.9x,0.75x,0.6x] [--repeats 9] [--again 15] [--threads N]
        [--llama-cpp DIR] [--vllm PROGRAM] [--dtype float32]

SmolLM2-135M, one sequence, 128 tokens of prompt and 64 after it, as ``shearling prune --speed``
does by default. Each speed is planned as the command plans it; then the shape is written anew with
random weights and timed against the source in rounds of their own, which the plan has not seen; no
repair is needed: what weights hold does not change what they cost. Rows of other engines and
targets stay in the results. Needs a machine to itself; with one thread, a core to itself.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, save, source_directory
from shearling.errors import ShearlingError
from shearling.evaluate.engines import Places
from shearling.files.terminal import progress_bars
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.plan import Spending
from shearling.pruning.preferences import PREFERENCES
from shearling.table.cost import kv_cache_bytes
from shearling.targets.asked import TargetLoad, Targets, footprint, parse_footprint, parse_speed
from shearling.targets.meet import meet
from shearling.targets.shapes import write_random
from shearling.targets.timing import EngineTimer

WITHIN_SPEED, WITHIN_MEMORY = 0.05, 0.02  # the figures to reach


def main() -> None:
    """Plan, time again, count, and write all of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--engines", default="transformers,llama.cpp", help="separated by commas")
    parser.add_argument("--speeds", default="1.15x,1.3x,1.6x", help="separated by commas")
    parser.add_argument("--footprints", default="0.9x,0.75x,0.6x", help="separated by commas")
    parser.add_argument("--prefer", choices=list(PREFERENCES), default="balanced")
    parser.add_argument("--repeats", type=int, default=9, help="rounds of the plan")
    parser.add_argument("--again", type=int, default=15, help="rounds afterwards")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--llama-cpp", type=Path, help="a directory with llama.cpp's programs")
    parser.add_argument("--vllm", type=Path, help="the program vllm of its environment")
    parser.add_argument("--dtype", default="float32", help="what to compute in")
    arguments = parser.parse_args()
    source = Checkpoint.open(source_directory())
    rows = [
        _speed(source, arguments, engine, speed)
        for engine in _parts(arguments.engines)
        for speed in _parts(arguments.speeds)
    ]
    counted = [_footprint(source, arguments.prefer, text) for text in _parts(arguments.footprints)]
    known = _known()
    save(
        "targets",
        {
            "speeds": _joined(known["speeds"], rows, ("engine", "asked")),
            "footprints": _joined(known["footprints"], counted, ("asked",)),
        },
        shown=False,
    )
    for row in rows:
        print(_line(row))
    for row in counted:
        off = row["bytes"] / row["asked_bytes"] - 1
        print(f"footprint {row['asked']}: {row['bytes'] / 1e6:.1f} MB, {off:+.2%} {_met(row)}")


def _parts(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _known() -> dict[str, list[dict[str, Any]]]:
    file = RESULTS / "targets.json"
    return json.loads(file.read_text()) if file.exists() else {"speeds": [], "footprints": []}


def _joined(
    known: list[dict[str, Any]], rows: list[dict[str, Any]], keys: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Rows of other engines and targets stay; those that were measured anew take their place."""
    new = {tuple(row[key] for key in keys) for row in rows}
    kept = [row for row in known if tuple(row[key] for key in keys) not in new]
    return kept + rows


def _speed(
    source: Checkpoint, arguments: argparse.Namespace, engine: str, speed: str
) -> dict[str, Any]:
    """A speed asked for, planned, and timed again."""
    load = TargetLoad(
        engine=engine, places=Places(arguments.llama_cpp, arguments.vllm),
        dtype=arguments.dtype, threads=arguments.threads, repeats=arguments.repeats,
    )  # fmt: skip
    row: dict[str, Any] = {"engine": engine, "asked": speed}
    with progress_bars() as progress:
        try:
            plan = meet(
                source, Targets(speed=speed, load=load), Spending(arguments.prefer),
                timer=EngineTimer(source, load, progress), notify=print,
            )  # fmt: skip
        except ShearlingError as error:
            return row | {"reached": False, "reason": str(error)}
        again = TargetLoad(**_fields(load) | {"repeats": arguments.again})
        _, timed = EngineTimer(source, again, progress)([plan.shape])
    return row | {
        "shape": dict(plan.shape),
        "plan": plan.as_json(),
        "again": {"speed": timed.speed, "min": timed.slowest, "max": timed.fastest},
        "reached": abs(timed.speed / parse_speed(speed) - 1) <= WITHIN_SPEED,
    }


def _fields(load: TargetLoad) -> dict[str, Any]:
    return {name: getattr(load, name) for name in load.__dataclass_fields__}


def _footprint(source: Checkpoint, prefer: str, text: str) -> dict[str, Any]:
    """A size asked for, and the bytes of files of that shape and of the cache beside them."""
    load = TargetLoad()
    shape = meet(source, Targets(footprint=text, load=load), Spending(prefer)).shape
    with tempfile.TemporaryDirectory() as scratch:
        write_random(source, shape, Path(scratch) / "model")
        weights = Checkpoint.open(Path(scratch) / "model").bytes
    taken = weights + kv_cache_bytes(None, shape, load.context_of(source))
    asked = parse_footprint(text, footprint(source, source.shape, load))
    return {
        "asked": text, "asked_bytes": asked, "shape": dict(shape), "bytes": taken,
        "reached": abs(taken / asked - 1) <= WITHIN_MEMORY,
    }  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    head = f"{row['engine']} {row['asked']}"
    if "again" not in row:
        return f"{head}: {row['reason']}"
    shape, again = row["shape"], row["again"]
    return (
        f"{head}: layers={shape['layers']}, mlp={shape['mlp']}: {again['speed']:.3f}x "
        f"({again['min']:.2f}-{again['max']:.2f}) {_met(row)}"
    )


def _met(row: dict[str, Any]) -> str:
    return "(reached)" if row["reached"] else "(NOT reached)"


if __name__ == "__main__":
    main()
