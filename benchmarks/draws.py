"""The default cut over several draws of its text, and what else could be the default.

    SHEARLING_BENCH_DATA=DIR python benchmarks/draws.py [--only ARM,...] [--draws 0,1,2]
        [--size 0.8x]

One draw says little: other calibration documents move WikiText-2 by two points. An arm is a way to
cut SmolLM2-135M (or ``SHEARLING_BENCH_MODEL``); a draw is a seed, which draws documents, windows
and what the model writes. Arms ``blocks=F`` give the share F of what goes to whole blocks and the
rest to MLP neurons; ``samples=N`` takes so many windows instead of 64, ``written=N`` so many
sequences of the model's own for each window instead of 4. ``default`` is what `prune --params`
does. Measured: 12 windows of 512 tokens of c4 documents that calibration never saw, and of
WikiText-2; and what is left of the source's abilities, in the likelihood of right answers
(docs/abilities.md). Every row is a process of its own and is written down as it ends, so that the
run can be stopped and taken up again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

from common import RESULTS, first_nine_tenths, save, source_directory, text_file

NAME = "draws"
WINDOW, WINDOWS = 512, 12
ITEMS = 8  # of each ability
ARMS = ("default", "blocks=0", "blocks=0.1667", "blocks=0.5", "blocks=1", "samples=128")
MEASURES = ("c4", "wikitext2", "kept")


def main() -> None:
    """Run what has not been run, then print means and ranges."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(ARMS), help="arms, separated by commas")
    parser.add_argument("--draws", default="0,1,2", help="seeds, separated by commas")
    parser.add_argument("--size", default="0.8x", help="of the parameters in blocks")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print("ROW " + json.dumps(measured(json.loads(arguments.job))))
        return
    arms = ["source", *arguments.only.split(",")]
    for draw in map(int, arguments.draws.split(",")):
        for arm in arms:
            job = {"arm": arm, "size": "1x" if arm == "source" else arguments.size,
                   "draw": 0 if arm == "source" else draw}  # fmt: skip
            if not any(job.items() <= row.items() for row in known()):
                row = in_a_process(job)
                save(NAME, {"rows": [*known(), row]}, shown=False)  # read again: another may run
                print(row, flush=True)
    for line in summary(known()):
        print(line)


def known() -> list[dict[str, Any]]:
    """The rows that there are."""
    file = RESULTS / f"{NAME}.json"
    return json.loads(file.read_text())["rows"] if file.exists() else []


def in_a_process(job: dict[str, Any]) -> dict[str, Any]:
    """One row, measured apart."""
    done = subprocess.run(
        [sys.executable, __file__, "--job", json.dumps(job)], stdout=subprocess.PIPE, text=True,
        check=True,
    )  # fmt: skip
    return json.loads(done.stdout.rsplit("ROW ", 1)[1])


def measured(job: dict[str, Any]) -> dict[str, Any]:
    """Cut as the job says, then measure."""
    from shearling.evaluate.abilities.measure import Asking, measure_abilities
    from shearling.evaluate.perplexity import Windows, evaluate
    from shearling.model.checkpoint import Checkpoint
    from shearling.model.loading import load_model
    from shearling.model.subject import open_subject

    started = time.perf_counter()
    source = Checkpoint.open(source_directory())
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        path, row = source.path, dict(job)
        if job["arm"] != "source":
            path = scratch / "cut"
            row |= cut(source, job, path, scratch)
        row["seconds_cutting"] = round(time.perf_counter() - started, 1)
        row["processor_seconds_cutting"] = round(time.process_time(), 1)
        for name, file in texts(scratch).items():
            figures = evaluate(path, file, Windows(WINDOW, WINDOWS))
            row[name] = round(figures["perplexity"], 2)
        subject = open_subject(path)
        asked = measure_abilities(
            subject, load_model(path), subject.tokenizer(), Asking(limit=ITEMS)
        )
    row["abilities"] = {
        name: {key: one[key] for key in ("losses", "lengths", "exact") if one.get(key) is not None}
        for name, one in asked["abilities"].items()
    }
    return row


def cut(source: Any, job: dict[str, Any], output: Path, scratch: Path) -> dict[str, Any]:
    """Cut and repair by default, but for what the arm changes."""
    from shearling.pruning.preferences import PREFERENCES, Preference
    from shearling.pruning.prune import prune
    from shearling.pruning.size import Size
    from shearling.pruning.text import CalibrationText

    key, _, value = job["arm"].partition("=")
    if key == "blocks":
        cast(dict, PREFERENCES)["balanced"] = Preference(float(value), "")
    samples = int(value) if key == "samples" else 64
    written = int(value) * samples if key == "written" else None
    text = first_nine_tenths(text_file("redpajama/c4.jsonl", scratch), scratch)
    calibration = CalibrationText(file=text, samples=samples, seed=job["draw"], written=written)
    blocks = source.shape["layers"] * source.layout.count_block(source.shape)
    gone = round((1 - float(job["size"].rstrip("x"))) * blocks)
    made = prune(source, output, Size(params=source.parameters - gone), calibration=calibration)
    return {"shape": {axis: made.shape[axis] for axis in ("layers", "mlp")},
            "parameters": made.parameters}  # fmt: skip


def texts(scratch: Path) -> dict[str, Path]:
    """What perplexity is measured on."""
    lines = text_file("redpajama/c4.jsonl", scratch).read_text("utf-8").splitlines(keepends=True)
    held = scratch / "held.jsonl"
    held.write_text("".join(lines[len(lines) * 9 // 10 :]), encoding="utf-8")
    return {"c4": held, "wikitext2": text_file("wikitext2-test.txt", scratch)}


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
