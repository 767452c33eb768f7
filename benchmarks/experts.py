"""Experts removed: every criterion, with and without repair, at a quarter and at half of them.

    SHEARLING_BENCH_MODEL=MIXTURE SHEARLING_BENCH_DATA=DIR python benchmarks/experts.py \\
        [--left N,M] [--repair none,refit,router,merge] [--mixed] [--written] [--device auto]

MIXTURE is what ``benchmarks/make_moe.py`` writes. Calibration is 64 windows of 256 tokens from the
first nine tenths of c4.jsonl, or with --mixed equally many from each of seven domains. Evaluation
is the first 8 windows of 512 tokens of c4's last tenth, and of WikiText-2. Experts are scored once
for all criteria. Each row is written down as it ends, so that the run can be stopped and taken up
again; other text wants another --name.

"refit" is the default repair, "router" lets the router's rows move too, "merge" first folds experts
that go into those that stay. With --written a repair sees what `shearling prune` adds to the
windows: a copy that the source rewrote in part, and four sequences of its own for each. "kept" is
the share of the perplexity lost without repair that repair takes away.
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
from shearling.data.bos import TokenWindows
from shearling.data.documents import documents
from shearling.data.sources import TextSource
from shearling.data.text import calibration_windows
from shearling.engine.place import Need, Place, Wish
from shearling.engine.stream import BlockStream
from shearling.engine.walk import last_states
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.choose import keep_units
from shearling.pruning.cut import cut
from shearling.repair.calibration import Calibration, repair_text
from shearling.repair.experts import ExpertOptions
from shearling.repair.refit import KEPT_WIDTHS, refit
from shearling.scoring.registry import find
from shearling.scoring.score_experts import routed
from shearling.scoring.scores import Scores

CRITERIA = ("frequency", "ean", "reap", "reroute")
REPAIRS = {
    "refit": ExpertOptions(),
    "router": ExpertOptions(router=True),
    "merge": ExpertOptions(merge=True),
}
DOMAINS = ("arxiv", "book", "c4", "cc", "github", "stackexchange", "wiki")
SAMPLES, LENGTH = 64, 256
WINDOWS, WINDOW = 8, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--left", default="12,8", help="experts that stay, by row")
    parser.add_argument(
        "--by", default=",".join(CRITERIA),
        help="criteria; 'neurons' takes as many parameters out of all experts instead",
    )  # fmt: skip
    parser.add_argument(
        "--repair", default="none,refit", help=f"of none, {', '.join(REPAIRS)}"
    )  # fmt: skip
    parser.add_argument("--mixed", action="store_true", help="calibrate on all seven domains")
    parser.add_argument("--written", action="store_true", help="repair on the source's text too")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, or auto for a GPU if any")
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
        self.stream = BlockStream(self.source, place_for(self.source, given))
        tokenizer = self.source.tokenizer()
        self.windows = _calibration(self.source, given, scratch)
        self.ids_NS = self.repair_NS = self.windows.ids_NS
        if given.written:
            text = Calibration((TextSource(scratch),), samples=given.samples, length=LENGTH)
            self.repair_NS = repair_text(self.stream, text, self.windows)
        c4 = text_file("redpajama/c4.jsonl", scratch)
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
            for repair in self.given.repair.split(",")
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
            if row["repair"] != "none":
                (Path(directory) / "solved").mkdir()
                solved = refit(
                    self.stream, keep, self.repair_NS, Path(directory) / "solved",
                    windows=self.given.samples, experts=REPAIRS[row["repair"]],
                )  # fmt: skip
                replaced = solved.replaced
                row["seconds_repairing"] = round(solved.seconds, 1)
                steps = [s for s in solved.steps if s.axis == "experts"]
                row["left_missing"] = round(
                    sum(s.error_after for s in steps) / sum(s.error_before for s in steps), 4
                )
                row["routers_moved"] = sum(
                    "gate.weight" in n or "router" in n for n in solved.replaced
                )
            result = cut(
                self.source, keep, Path(directory) / "cut", replaced=replaced,
                place=self.stream.place,
            )  # fmt: skip
            self.row(row, result)

    def known(self, experts: int, by: str, repair: str) -> bool:
        return any((r["experts"], r["by"], r["repair"]) == (experts, by, repair) for r in self.rows)

    @torch.inference_mode()
    def row(self, row: dict[str, Any], model: Checkpoint) -> None:
        if self.known(row["experts"], row["by"], row["repair"]):
            return
        stream = BlockStream(model, place_for(model, self.given))
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
        facts = {
            "model": self.source.name, "device": str(self.stream.place.device),
            "calibration": {
                "samples": self.given.samples, "length": LENGTH, "mixed": self.given.mixed,
                "tokens_repaired_on": self.repair_NS.numel(),
            },
        }  # fmt: skip
        save(self.given.name, facts | {"rows": self.rows})


def place_for(model: Checkpoint, given: Any) -> Place:
    """Where a model runs: the processor as ever, or a GPU with room for what a repair keeps."""
    if given.device == "cpu":
        return Place.cpu()
    sequences = given.samples * (6 if given.written else 1)
    shape = model.shape
    values = KEPT_WIDTHS * shape["hidden"] + shape["heads"] * shape["head_dim"]
    return Place.best(model, Wish(device=given.device), Need(sequences * LENGTH, values))


def _calibration(source: Checkpoint, given: Any, scratch: Path) -> TokenWindows:
    """Windows of c4, or of all domains in turn; the last domains have one less if it must be."""
    domains = DOMAINS if given.mixed else ("c4",)
    parts = []
    for number, domain in enumerate(domains):
        file = text_file(f"redpajama/{domain}.jsonl", scratch)
        count = given.samples // len(domains) + (number < given.samples % len(domains))
        if count:
            windows = calibration_windows(
                documents(first_nine_tenths(file, scratch)), source.tokenizer(),
                samples=count, length=LENGTH, seed=0,
            )  # fmt: skip
            parts.append(windows)
    # In turn, so that what is held out, every fourth window, is of all domains.
    most = max(len(part.ids_NS) for part in parts)
    rows = [part.ids_NS[n] for n in range(most) for part in parts if n < len(part.ids_NS)]
    return TokenWindows(torch.stack(rows), parts[0].bos)


def with_shares(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the share of the lost perplexity that repair takes away."""
    dense = next(r for r in rows if not r["by"])
    for row in rows:
        plain = [
            r for r in rows
            if (r["experts"], r["by"], r["repair"]) == (row["experts"], row["by"], "none")
        ]  # fmt: skip
        if row["repair"] not in ("none", "") and row["by"] and plain:
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
