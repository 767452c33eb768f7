"""What shearling computes, to the last bit, so that a refactoring can show it changed nothing.

    python benchmarks/record.py --output FILE [--only PART,...]   # take the record
    python benchmarks/record.py --compare FILE [--only PART,...]  # take it again, print differences

Parts are ``tiny VARIANT``, ``train FAMILY``, ``demo``, ``quantize`` and ``real``; ``--only`` takes
whole names or their first word, and leaves the other parts of a record that exists as they are.

Floats are hexadecimal, weights and long lists hashes. Figures are of one kind of processor and one
set of versions, which stand under ``made_on`` and are not compared: take a new record where they
differ. What was refused, or failed, is recorded as the sentence that said so. Set
``SHEARLING_ONEDNN=1`` both times to record what the products of oneDNN give.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

WORKERS = 2
FIXED = {
    "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "COLUMNS": "80", "PYTHONHASHSEED": "0",
}  # fmt: skip


def main() -> int:
    """Take the record, and write or compare it."""
    parser = argparse.ArgumentParser()
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--output", type=Path, help="write the record here")
    where.add_argument("--compare", type=Path, help="a record that nothing may differ from")
    parser.add_argument("--only", help="parts, or their first words, separated by commas")
    arguments = parser.parse_args()
    os.environ.update(FIXED)
    names = [name for name in _parts() if _wanted(name, arguments.only)]
    found = dict(sorted(_taken(names)))
    if arguments.output:
        if arguments.only and arguments.output.exists():  # the other parts of a record stay
            found = json.loads(arguments.output.read_text("utf-8"))["parts"] | found
        record = {"made_on": _made_on(), "parts": found}
        text = json.dumps(record, indent=0, sort_keys=True, ensure_ascii=False)
        arguments.output.write_text(text + "\n", encoding="utf-8")
        return 0
    known = json.loads(arguments.compare.read_text("utf-8"))
    if known["made_on"] != _made_on():
        print(f"made on {known['made_on']}, compared on {_made_on()}", file=sys.stderr)
    parts = {n: p for n, p in known["parts"].items() if _wanted(n, arguments.only)}
    return _compare(parts, found)


def _parts() -> list[str]:
    """Names of all parts, the longest first."""
    from record_training import FAMILIES  # puts the tests on the path

    variants = importlib.import_module("tiny_models").VARIANTS

    small = [*(f"tiny {name}" for name in variants), "quantize", "demo"]
    return ["real", *(f"train {name}" for name in FAMILIES), *small]


def _wanted(name: str, only: str | None) -> bool:
    return only is None or not {name, name.split()[0]}.isdisjoint(only.split(","))


def _taken(names: list[str]) -> Iterator[tuple[str, Any]]:
    """Every part, each on one thread, so that two run at a time and no number of cores matters."""
    spawn, started = multiprocessing.get_context("spawn"), time.perf_counter()
    with ProcessPoolExecutor(WORKERS, mp_context=spawn) as pool:
        jobs = {pool.submit(part, name): name for name in names}
        for job in as_completed(jobs):
            found, seconds = job.result()
            total = time.perf_counter() - started
            print(f"{total:5.0f} s  {jobs[job]} ({seconds:.0f} s)", file=sys.stderr, flush=True)
            yield jobs[job], found


def part(name: str) -> tuple[Any, float]:
    """One part, or the error that ended it, and its seconds."""
    import torch

    from record_models import demo, quantized, real, variant
    from record_training import training

    torch.set_num_threads(1)
    kind, _, which = name.partition(" ")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="record-") as place:
        scratch = Path(place)
        try:
            if kind in ("tiny", "train"):
                found: Any = (variant if kind == "tiny" else training)(which, scratch)
            else:
                found = {"demo": demo, "quantize": quantized, "real": real}[kind](scratch)
        except Exception as error:
            traceback.print_exc()
            found = f"failed: {type(error).__name__}: {error}".replace(place, "SCRATCH")
    return found, time.perf_counter() - started


def _made_on() -> dict[str, str]:
    """What figures may depend on besides the code."""
    import platform
    from importlib.metadata import version

    import torch

    names = ("torch", "transformers", "tokenizers", "safetensors", "peft", "torchao", "numpy")
    found = {name: version(name) for name in names}
    found["processor"] = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    found["onednn"] = os.environ.get("SHEARLING_ONEDNN", "by processor")
    return found | {"python": platform.python_version()}


def _compare(known: Any, found: Any) -> int:
    """Print every key whose values differ; 1 if there is one."""
    before, after = dict(_flat(known)), dict(_flat(found))
    differing = 0
    for key in sorted({*before, *after}):
        values = [_shown(side.get(key, "(absent)")) for side in (before, after)]
        if before.get(key, _ABSENT) != after.get(key, _ABSENT):
            differing += 1
            print(f"{key}\n    was {values[0]}\n    is  {values[1]}")
    print(f"{differing} of {len(before)} values differ")
    return 1 if differing or not before else 0


_ABSENT = object()


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by their path."""
    if not isinstance(value, dict | list) or not value:
        yield key, value
        return
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for name, each in pairs:
        yield from _flat(each, f"{key}/{name}" if key else str(name))


def _shown(value: Any) -> str:
    """A value for a person: hexadecimal floats are followed by what they are."""
    words = str(value).replace("[", " ").replace("]", " ").split()
    floats = [word for word in words if word.lstrip("-").startswith("0x")]
    read = ", ".join(f"{float.fromhex(word):.9g}" for word in floats)
    return f"{value} ({read})" if floats else str(value)


if __name__ == "__main__":
    sys.exit(main())
