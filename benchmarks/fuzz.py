"""Damages files, our own and others', and reads them: what is refused, read, or breaks.

    python benchmarks/fuzz.py [--mutations 2000] [--only PART] [--seconds 1400] [--anew]

Each format runs in a process of its own, which is stopped at 10 seconds for one file. Prints a
table; results are added to results/fuzz.json after every format, from where a further call goes
on, and --seconds ends a call early. Exits with 1 if anything ended in a traceback or took more than
1 GiB. The formats and the mutations are those of tests/fuzzing.py; a format is added by one
function there.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import multiprocessing
import resource
import signal
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from common import RESULTS, save
from fuzzing import attempts  # ty: ignore[import-not-found]
from input_formats import input_formats  # ty: ignore[import-not-found]
from own_formats import own_formats  # ty: ignore[import-not-found]

LONGEST, MOST = 10, 1024  # seconds for one file, and MiB for all of a format


def formats() -> list[Any]:
    """Those of our own files, then those of files that others give us."""
    return [*own_formats(), *input_formats()]


def measure(index: int, count: int, answer: Connection) -> None:
    """One format, in this process: sends a row of the table."""
    form = formats()[index]

    def too_long(*_: object) -> None:
        raise TimeoutError(f"more than {LONGEST} seconds")

    signal.signal(signal.SIGALRM, too_long)
    read = form.read

    def timed(folder: Path) -> object:
        signal.alarm(LONGEST)
        # A library that does not come back lets no handler of Python's run.
        faulthandler.dump_traceback_later(2 * LONGEST, exit=True)
        try:
            return read(folder)
        finally:
            signal.alarm(0)
            faulthandler.cancel_dump_traceback_later()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        form_timed = type(form)(form.kind, form.write, timed, form.file, form.text)
        outcome = attempts(form_timed, count, Path(folder))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = {
        "kind": form.kind,
        "mutations": count,
        "refused": outcome.refused,
        "read": outcome.read,
        "tracebacks": len(outcome.tracebacks),
        "slowest_ms": round(outcome.slowest * 1000, 1),
        "peak_mib": after // 1024,
        "grown_mib": (after - before) // 1024,
        "examples": outcome.tracebacks[:5],
    }
    answer.send(row)


def measured(index: int, kind: str, count: int) -> dict[str, Any]:
    """A row of the table, from a process of its own; one that died is a row as well."""
    context = multiprocessing.get_context("fork")  # libraries take longer to import than to run
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(index, count, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        died = f"the process died with {process.exitcode}, or did not come back"
        nothing = {"refused": 0, "read": 0, "slowest_ms": 0.0, "peak_mib": 0, "grown_mib": 0}
        return {"kind": kind, "mutations": count, **nothing, "tracebacks": 1, "examples": [died]}
    finally:
        process.join()


def show(row: dict[str, Any]) -> None:
    """A line of the table, and what broke."""
    print(
        f"{row['kind']:<26} {row['mutations']:>8,} {row['refused']:>8,} {row['read']:>6,} "
        f"{row['tracebacks']:>6} {row['slowest_ms']:>6} ms {row['peak_mib']:>5} MiB",
        flush=True,
    )
    for example in row["examples"]:
        print(f"    {example}", flush=True)


def main() -> int:
    """Run all formats, or those whose name has a part; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--only", default="", help="a part of the formats' names")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--anew", action="store_true", help="whatever was measured before")
    given = parser.parse_args()
    file = RESULTS / "fuzz.json"
    before = json.loads(file.read_text())["rows"] if file.is_file() else []
    kinds = [form.kind for form in formats()]
    rows = {row["kind"]: row for row in before if row["kind"] in kinds}
    begun = time.perf_counter()
    print(
        f"{'kind':<26} {'mutated':>8} {'refused':>8} {'read':>6} {'broke':>6} "
        f"{'slowest':>9} {'peak':>9}"
    )
    for index, kind in enumerate(kinds):
        measured_before = kind in rows and rows[kind]["mutations"] == given.mutations
        if given.only not in kind or (measured_before and not given.anew):
            continue
        if time.perf_counter() - begun > given.seconds:
            break
        rows[kind] = measured(index, kind, given.mutations)
        show(rows[kind])
        save("fuzz", {"rows": [rows[kind] for kind in kinds if kind in rows]}, shown=False)
    return int(any(row["tracebacks"] or row["peak_mib"] > MOST for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
