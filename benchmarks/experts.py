"""Experts removed: every criterion, with and without repair, at a quarter and at half of them.

    SHEARLING_BENCH_MODEL=MIXTURE SHEARLING_BENCH_DATA=DIR python benchmarks/experts.py [--left N,M]

MIXTURE is what ``benchmarks/make_moe.py`` writes. Calibration is 64 windows of 256 tokens from the
first nine tenths of c4.jsonl, evaluation the first 8 windows of 512 tokens of its last tenth, and
of WikiText-2. Experts are scored once for all criteria. Each row is written down as it ends, so
that the run can be stopped and taken up again. "kept" is the share of the perplexity lost without
repair that repair takes away.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, first_nine_tenths, save, source_directory, text_file
from shearling.data.documents import documents
from shearling.data.text import calibration_windows
from shearling.engine.place import Place
from shearling.engine.stream import BlockStream
from shearling.engine.walk import last_states
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.choose import keep_units
from shearling.pruning.cut import cut
from shearling.repair.refit import refit
from shearling.scoring.registry import find
from shearling.scoring.score_experts import routed
from shearling.scoring.scores import Scores

CRITERIA = ("frequency", "ean", "reap", "reroute")
SAMPLES, LENGTH = 64, 256
WINDOWS, WINDOW = 8, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--left", default="12,8", help="experts that stay, by row")
    parser.add_argument(
        "--by", default=",".join(CRITERIA),
        help="criteria; 'neurons' takes as many parameters out of all experts instead",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--name", default="experts")
    parser.add_argument("--again", action="store_true", help="forget the rows there are")
    given = parser.parse_args()
    file = RESULTS / f"{given.name}.json"
    known = {} if given.again or not file.is_file() else json.loads(file.read_text())
    rows: list[dict[str, Any]] = known.get("rows", [])
    with tempfile.TemporaryDirectory() as scratch:
        Measuring(rows, given, Path(scratch)).run()


class Measuring:
    """The mixture, its texts, and the rows so far."""

    def __init__(self, rows: list[dict[str, Any]], given: Any, scratch: Path) -> None:
        self.rows, self.given, self.scratch = rows, given, scratch
        self.source = Checkpoint.open(source_directory())
        self.stream = BlockStream(self.source, Place.cpu())
        tokenizer = self.source.tokenizer()
        c4 = text_file("redpajama/c4.jsonl", scratch)
        self.ids_NS = calibration_windows(
            documents(first_nine_tenths(c4, scratch)), tokenizer, samples=given.samples,
            length=LENGTH, seed=0,
        ).ids_NS  # fmt: skip
        lines = c4.read_text(encoding="utf-8").splitlines()
        held = [json.loads(line)["text"] for line in lines[len(lines) * 9 // 10 :]]
        wikitext = text_file("wikitext2-test.txt", scratch).read_text(encoding="utf-8")
        self.texts = {
            "c4": _windows(tokenizer, "\n\n".join(held)),
            "wikitext2": _windows(tokenizer, wikitext),
        }

    def run(self) -> None:
        self.row({"experts": self.source.shape["experts"], "by": "", "repair": "none"}, self.source)
        wanted = [
            (int(left), by, repair)
            for left in self.given.left.split(",")
            for by in self.given.by.split(",")
            for repair in ("none", "refit")
        ]
        missing = [w for w in wanted if not self.known(*w)]
        if not missing:
            return
        started = time.perf_counter()
        sums, energies = routed(self.stream, self.ids_NS, "scoring")
        seconds = round(time.perf_counter() - started, 1)
        for left, by, repair in missing:
            shape = self.source.shape
            if by == "neurons":
                axis, size = "expert_mlp", shape["expert_mlp"] * left // shape["experts"]
                values = tuple(tuple(energy.flatten().tolist()) for energy in energies)
            else:
                axis, size = "experts", left
                values = tuple(tuple(find(by, "experts").function(s).tolist()) for s in sums)
            keep = keep_units(
                {axis: Scores(by, axis, values)}, self.source.layout, shape,
                shape.with_(**{axis: size}), tuple(range(shape["layers"])),
            )  # fmt: skip
            row = {"experts": left, "by": by, "repair": repair, "seconds_scoring": seconds}
            self.measure(row, keep)

    def measure(self, row: dict[str, Any], keep: Any) -> None:
        with tempfile.TemporaryDirectory(dir=self.scratch) as directory:
            replaced = {}
            if row["repair"] == "refit":
                (Path(directory) / "solved").mkdir()
                solved = refit(self.stream, keep, self.ids_NS, Path(directory) / "solved")
                replaced = solved.replaced
                row["seconds_repairing"] = round(solved.seconds, 1)
                steps = [s for s in solved.steps if s.axis == "experts"]
                row["left_missing"] = round(
                    sum(s.error_after for s in steps) / sum(s.error_before for s in steps), 4
                )
            result = cut(self.source, keep, Path(directory) / "cut", replaced=replaced)
            self.row(row, result)

    def known(self, experts: int, by: str, repair: str) -> bool:
        return any((r["experts"], r["by"], r["repair"]) == (experts, by, repair) for r in self.rows)

    @torch.inference_mode()
    def row(self, row: dict[str, Any], model: Checkpoint) -> None:
        if self.known(row["experts"], row["by"], row["repair"]):
            return
        stream = BlockStream(model, Place.cpu())
        for name, ids_NS in self.texts.items():
            batches = stream.batches(ids_NS)
            losses = [
                stream.nll(h_BSD, ids_BS).double().flatten()
                for h_BSD, ids_BS in zip(last_states(stream, batches), batches, strict=True)
            ]
            row[name] = round(float(torch.cat(losses).mean().exp()), 3)
        self.rows.append(row | {"parameters": model.parameters})
        self.rows = with_shares(self.rows)
        print(self.rows[-1], flush=True)
        save(self.given.name, {"model": self.source.name, "rows": self.rows})


def with_shares(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the share of the lost perplexity that repair takes away."""
    dense = next(r for r in rows if not r["by"])
    for row in rows:
        plain = [
            r for r in rows
            if (r["experts"], r["by"], r["repair"]) == (row["experts"], row["by"], "none")
        ]  # fmt: skip
        if row["repair"] == "refit" and plain:
            row["kept"] = {
                text: round((plain[0][text] - row[text]) / (plain[0][text] - dense[text]), 3)
                for text in ("c4", "wikitext2")
            }
    return rows


def _windows(tokenizer: Any, text: str) -> torch.Tensor:
    ids = tokenizer(text[: WINDOWS * WINDOW * 8], add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: WINDOWS * WINDOW]).view(WINDOWS, WINDOW)


if __name__ == "__main__":
    main()
