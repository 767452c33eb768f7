"""The default cut over several draws of its text, and what else could be the default.

    SHEARLING_BENCH_DATA=DIR python benchmarks/draws.py [--only ARM,...] [--draws 0,1,2]
        [--sizes 0.8x,0.6x]

One draw says little: other calibration documents move WikiText-2 by two points. An arm is a way to
cut SmolLM2-135M (or ``SHEARLING_BENCH_MODEL``); a draw is a seed, which draws documents, windows
and what the model writes. Arms ``blocks=F`` give the share F of what goes to whole blocks and the
rest to MLP neurons; ``samples=N`` takes so many windows instead of 64, ``written=N`` so many
sequences of the model's own for each window instead of 4. ``default`` is what `prune --params`
does. Measured: 12 windows of 512 tokens of c4 documents that calibration never saw, and of
WikiText-2; and what is left of the source's abilities, in the likelihood of right answers
(docs/abilities.md). Arms and sizes of a draw that see the same text are cut together, as `prune
--params 0.8x,0.6x` does, in a process of its own; every row is written down as it ends, so that
the run can be stopped and taken up again. Seconds are the processor's, of all cuts of the draw.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from common import RESULTS, first_nine_tenths, held_out_windows, save, source_directory, text_file

NAME = "draws"
ITEMS = 8  # of each ability
ARMS = ("default", "blocks=0", "blocks=0.1667", "blocks=0.5", "blocks=1", "samples=128")
MEASURES = ("c4", "wikitext2", "kept")


def main() -> None:
    """Run what has not been run, then print means and ranges."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(ARMS), help="arms, separated by commas")
    parser.add_argument("--draws", default="0,1,2", help="seeds, separated by commas")
    parser.add_argument("--sizes", default="0.8x", help="of the parameters in blocks")
    parser.add_argument("--jobs", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.jobs:
        for row in measured(json.loads(arguments.jobs)):
            print("ROW " + json.dumps(row), flush=True)
        return
    asked = [{"arm": "source", "size": "1x", "draw": 0}]
    for draw in map(int, arguments.draws.split(",")):
        asked += [
            {"arm": arm, "size": size, "draw": draw}
            for size in arguments.sizes.split(",")
            for arm in arguments.only.split(",")
        ]
    groups: dict[Any, list[dict[str, Any]]] = {}
    for job in asked:
        if not any(job.items() <= row.items() for row in known()):
            groups.setdefault((job["draw"], job["size"] == "1x", text_of(job)), []).append(job)
    for jobs in groups.values():
        in_a_process(jobs)
    for line in summary(known()):
        print(line)


def text_of(job: dict[str, Any]) -> tuple[int, int | None]:
    """Windows, and sequences of the model's own, of an arm; None for as many as the default."""
    key, _, value = job["arm"].partition("=")
    samples = int(value) if key == "samples" else 64
    return samples, int(value) * samples if key == "written" else None


def known() -> list[dict[str, Any]]:
    """The rows that there are."""
    file = RESULTS / f"{NAME}.json"
    return json.loads(file.read_text())["rows"] if file.exists() else []


def in_a_process(jobs: list[dict[str, Any]]) -> None:
    """Rows that share a draw, measured apart, each written down as it comes."""
    words = [sys.executable, __file__, "--jobs", json.dumps(jobs)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ROW "):
                row = json.loads(line.removeprefix("ROW "))
                save(NAME, {"rows": [*known(), row]}, shown=False)  # read again: another may run
                print({key: row[key] for key in row if key != "abilities"}, flush=True)
    if process.returncode:
        raise SystemExit(f"{jobs} ended with {process.returncode}")


def measured(jobs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Cut as the jobs say, then measure each."""
    from shearling.evaluate.abilities.measure import Asking, measure_abilities
    from shearling.evaluate.perplexity import mean_nll
    from shearling.model.checkpoint import Checkpoint
    from shearling.model.loading import load_model
    from shearling.model.subject import open_subject

    started = time.process_time()
    source = Checkpoint.open(source_directory())
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        if jobs[0]["arm"] == "source":
            made = {source.path: dict(jobs[0])}
        else:
            made = cut(source, jobs, scratch)
        spent = round(time.process_time() - started, 1)
        for path, row in made.items():
            row |= {"processor_seconds_cutting": spent, "cut_together": len(made)}
            subject, model = open_subject(path), load_model(path)
            tokenizer = subject.tokenizer()
            for name, windows_NS in held_out_windows(tokenizer).items():
                total, count = mean_nll(model, windows_NS)
                row[name] = round(math.exp(total / count), 2)
            asked = measure_abilities(subject, model, tokenizer, Asking(limit=ITEMS))
            row["abilities"] = {
                name: {
                    key: one[key]
                    for key in ("losses", "lengths", "exact")
                    if one.get(key) is not None
                }
                for name, one in asked["abilities"].items()
            }
            yield row


def cut(source: Any, jobs: list[dict[str, Any]], scratch: Path) -> dict[Path, dict[str, Any]]:
    """Cut and repair by default, but for what the arms change: directory -> what is in it."""
    from shearling.pruning.family import prune_family
    from shearling.pruning.plan import Spending, shape_for
    from shearling.pruning.preferences import PREFERENCES, Preference
    from shearling.pruning.size import Size
    from shearling.pruning.text import CalibrationText

    samples, written = text_of(jobs[0])
    text = first_nine_tenths(text_file("redpajama/c4.jsonl", scratch), scratch)
    calibration = CalibrationText(
        file=text, samples=samples, seed=jobs[0]["draw"], written=written
    )  # fmt: skip
    blocks = source.shape["layers"] * source.layout.count_block(source.shape)
    rows: dict[str, dict[str, Any]] = {}
    sizes = []
    for job in jobs:
        key, _, value = job["arm"].partition("=")
        spending = Spending()
        if key == "blocks":
            cast(dict, PREFERENCES)[job["arm"]] = Preference(float(value), "")
            spending = Spending(job["arm"])
        gone = round((1 - float(job["size"].rstrip("x"))) * blocks)
        after = shape_for(source, source.parameters - gone, spending=spending)
        size = Size(shape={axis: after[axis] for axis in ("layers", "mlp")})
        sizes.append(size)
        rows[size.name] = dict(job)
    made = prune_family(source, scratch / "cuts", sizes, calibration=calibration)
    return {
        one.path: rows[name]
        | {
            "shape": {axis: one.shape[axis] for axis in ("layers", "mlp")},
            "parameters": one.parameters,
        }
        for name, one in made.items()
    }


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Of each arm and size the mean and range over draws."""
    source = next(row for row in rows if row["arm"] == "source")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["size"], row["arm"]), []).append(
            row | {"kept": kept(source, row)["left"]}
        )
    lines = []
    for (size, arm), of in sorted(groups.items()):
        told = []
        for measure in MEASURES:
            values = [row[measure] for row in of]
            spread = f" ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else ""
            told.append(f"{measure} {statistics.fmean(values):.4g}{spread}")
        lines.append(f"{size} {arm:<14} {len(of)} draws: {', '.join(told)}")
    return lines


def kept(source: dict[str, Any], row: dict[str, Any]) -> dict[str, float]:
    """The mean share of the source's abilities that is left, and its interval."""
    from shearling.evaluate.abilities.shares import Share, mean_share
    from shearling.evaluate.intervals import standard_error

    left = []
    for name, before in source["abilities"].items():
        after = row["abilities"][name]
        differences = [b - a for a, b in zip(before["losses"], after["losses"], strict=True)]
        left.append(Share(name, statistics.fmean(differences), standard_error(differences)))
    mean = mean_share(left)
    low, high = mean.interval
    return {"left": round(mean.left, 4), "low": round(low, 4), "high": round(high, 4)}


if __name__ == "__main__":
    main()
