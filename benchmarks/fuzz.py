"""Damages files, our own and others', and reads them: what is refused, read, or breaks.

    python benchmarks/fuzz.py [mutations a format, 2000] [part of a format's name]

Each format runs in a process of its own, which is stopped at 10 seconds for one file. Prints a
table and writes results/fuzz.json; exits with 1 if anything ended in a traceback. The formats and
the mutations are those of tests/fuzzing.py; a format is added by one function there.
"""

from __future__ import annotations

import multiprocessing
import resource
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from common import save
from fuzzing import attempts  # ty: ignore[import-not-found]
from input_formats import input_formats  # ty: ignore[import-not-found]
from own_formats import own_formats  # ty: ignore[import-not-found]

LONGEST = 10  # seconds for one file


def formats() -> list[Any]:
    """Those of our own files, then those of files that others give us."""
    return [*own_formats(), *input_formats()]


def measured(task: tuple[int, int]) -> dict[str, Any]:
    """One format, in this process: a row of the table."""
    index, count = task
    form = formats()[index]

    def too_long(*_: object) -> None:
        raise TimeoutError(f"more than {LONGEST} seconds")

    signal.signal(signal.SIGALRM, too_long)
    read = form.read

    def timed(folder: Path) -> object:
        signal.alarm(LONGEST)
        try:
            return read(folder)
        finally:
            signal.alarm(0)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        form_timed = type(form)(form.kind, form.write, timed, form.file, form.text)
        outcome = attempts(form_timed, count, Path(folder))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
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


def main() -> int:
    """Run all formats, or those whose name has a part; the exit status."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    part = sys.argv[2] if len(sys.argv) > 2 else ""
    wanted = [(i, count) for i, form in enumerate(formats()) if part in form.kind]
    rows = []
    print(
        f"{'kind':<26} {'mutated':>8} {'refused':>8} {'read':>6} {'broke':>6} "
        f"{'slowest':>9} {'peak':>9}"
    )
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for row in pool.imap(measured, wanted, chunksize=1):
            rows.append(row)
            print(
                f"{row['kind']:<26} {row['mutations']:>8,} {row['refused']:>8,} {row['read']:>6,} "
                f"{row['tracebacks']:>6} {row['slowest_ms']:>6} ms {row['peak_mib']:>5} MiB",
                flush=True,
            )
            for example in row["examples"]:
                print(f"    {example}", flush=True)
    save("fuzz", {"rows": rows})
    return int(any(row["tracebacks"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
