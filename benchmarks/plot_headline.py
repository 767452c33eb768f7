"""docs/headline.svg, and its place and a table in docs/headline.md, from results/headline.json.

python benchmarks/plot_headline.py [RESULT [DOCS]]

A row of panels for each size: held-out loss (mean of the domains, nats a token) against tokens, and
against minutes. The line of a run that was not finished is dotted, and it is not in the table.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from plot_healing import COLOURS, MARKERS, plain
from shearling.report.numbers import amount

HERE = Path(__file__).parent
START, END = "<!-- runs -->", "<!-- end of runs -->"
PICTURE = "![held-out loss over tokens and minutes](headline.svg)"
ABOVE = 1.0  # nats over the best end of a size from which on a curve is not shown

Run = dict[str, Any]


def main(file: Path, docs: Path) -> None:
    """Draw what there is, and write the table into the page if it has a place for it."""
    matplotlib.rcParams["svg.hashsalt"] = "shearling"
    result = json.loads(file.read_text(encoding="utf-8"))
    runs = {name: run for name, run in result["runs"].items() if run["tokens"]}
    if not runs:
        print(f"{file} has no run yet")
        return
    _write_table(result, docs / "headline.md")
    figure = _figure(runs, result["source"]["losses"])
    figure.patch.set_facecolor("#ffffff")  # a page of documentation may be dark
    figure.savefig(docs / "headline.svg", format="svg", metadata={"Date": None})


def _figure(runs: dict[str, Run], source: dict[str, float] | None) -> Figure:
    sizes = sorted({run["size"] for run in runs.values()}, reverse=True)
    titles = list(dict.fromkeys(run["title"] for run in runs.values()))
    figure = Figure(figsize=(10, 4 * len(sizes)), layout="constrained")
    rows = figure.subplots(len(sizes), 2, sharey="row", squeeze=False)
    for size, (left, right) in zip(sizes, rows, strict=True):
        own = [run for run in runs.values() if run["size"] == size]
        for run in own:
            place = titles.index(run["title"])
            _line(left, run, run["tokens"], place)
            _line(right, run, [seconds / 60 for seconds in run["seconds"]], place)
        best = min(run["loss"][-1] for run in own)
        bottom = best
        if source is not None:
            bottom = min(best, sum(source.values()) / len(source))
            for axes in (left, right):
                axes.axhline(bottom, color="#333333", linewidth=1, dashes=(4, 3), zorder=1)
        left.set_ylim(bottom - 0.05, best + ABOVE)
        left.set_title(f"{size} of the blocks' parameters", loc="left", fontsize=10)
        left.set_ylabel("held-out loss, nats a token", fontsize=9)
        plain(left, "tokens: calibration, gates and healing")
        left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
        plain(right, "minutes: choosing, gates and healing")
    handles: dict[str, Artist] = {}
    for axes in rows[:, 0]:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(str(label), handle)
    longest = max(map(len, handles), default=1)
    figure.legend(
        list(handles.values()), list(handles), frameon=False, loc="outside upper left",
        ncols=max(1, min(len(handles), 4, 130 // longest)), fontsize=9,
    )  # fmt: skip
    return figure


def _line(axes: Axes, run: Run, x: list[float], place: int) -> None:
    axes.plot(
        x, run["loss"], label=run["title"], color=COLOURS[place % len(COLOURS)],
        marker=MARKERS[(place + place // len(MARKERS)) % len(MARKERS)], markersize=4,
        markeredgecolor="#ffffff", markeredgewidth=0.6, linewidth=1.6,
        linestyle="solid" if run["finished"] else "dotted",
    )  # fmt: skip


def _write_table(result: dict[str, Any], page: Path) -> None:
    """The picture and every finished run, the best of a size first."""
    if not page.exists() or START not in (text := page.read_text(encoding="utf-8")):
        return
    before, rest = text.split(START, 1)
    after = rest.split(END, 1)[1]
    lines = [
        "| blocks' parameters | run | parameters | tokens: calibration, gates, healing | held-out "
        "loss after the cut | at the end | perplexity on c4 | on WikiText-2 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    source = result["source"]
    if source["losses"]:
        loss = sum(source["losses"].values()) / len(source["losses"])
        lines.append(f"| 1 | source | | | | {loss:.3f} | {_perplexities(source)} |")
    finished = [run for run in result["runs"].values() if run["finished"]]
    for run in sorted(finished, key=lambda run: (-float(run["size"]), run["loss"][-1])):
        cut = run["loss"][run["phase"].index("healing")]
        tokens = (run[f"{kind}_tokens"] for kind in ("calibration", "gate", "healing"))
        lines.append(
            f"| {run['size']} | {run['title']} | {run['parameters'] / 1e6:.1f} M "
            f"| {', '.join(f'{count:,}' for count in tokens)} | {cut:.3f} | {run['loss'][-1]:.3f} "
            f"| {_perplexities(run)} |"
        )
    table = "\n".join(lines)
    page.write_text(f"{before}{START}\n\n{PICTURE}\n\n{table}\n\n{END}{after}", encoding="utf-8")


def _perplexities(of: Run) -> str:
    measured = of["perplexity"] or {}
    return " | ".join(
        f"{measured[name]:.2f}" if name in measured else "" for name in ("c4", "wikitext2")
    )


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    main(
        given[0] if given else HERE / "results" / "headline.json",
        given[1] if len(given) > 1 else HERE.parent / "docs",
    )
