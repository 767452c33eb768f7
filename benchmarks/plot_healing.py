"""docs/healing.svg, mix.svg and learning.svg, from the results of the same names.

python benchmarks/plot_healing.py [RESULTS [DOCS]]

Both files hold ``{"runs": [{"name", "recipe", "tokens": [...], "seconds": [...], "loss": [...],
"losses": {domain: [...]}, "weights": {domain: [...]}, "reference": {domain: x}}]}``: an entry of
each list for every look at held-out text, losses in nats a token, ``loss`` the mean of the domains.
The first plot has a line a run; the second compares a run with constant weights and a dynamic one.
A file that is not there is passed over.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from shearling.report.numbers import amount

HERE = Path(__file__).parent
COLOURS = ("#d1495b", "#4c78a8", "#8a7d28", "#7a5276", "#3f8f76", "#e08e45", "#5b5b5b", "#9aa0a6")
MARKERS = "osD^vPX*"
DENSE = 25  # looks on a line from which on not each has a marker
START, END = "<!-- recipes -->", "<!-- end of recipes -->"
MOVED = 0.005  # a run in which no weight moves further has a constant mix

Run = dict[str, Any]


def main(results: Path, docs: Path) -> None:
    """Draw what there are results for."""
    matplotlib.rcParams["svg.hashsalt"] = "shearling"
    for name, draw in (("healing", _healing), ("mix", _mix), ("learning", _learning)):
        file = results / f"{name}.json"
        if not file.exists():
            print(f"{file} is not there; {name}.svg is left as it is")
            continue
        found = json.loads(file.read_text(encoding="utf-8"))
        runs = _timed(found)
        if name == "healing":
            _write_table(runs, docs / "healing.md")
        figure = draw(runs)
        figure.patch.set_facecolor("#ffffff")  # a page of documentation may be dark
        figure.savefig(docs / f"{name}.svg", format="svg", metadata={"Date": None})


def _timed(found: dict[str, Any]) -> list[Run]:
    """Runs with the seconds they take alone, where a step of each was timed in turns."""
    steps, tokens = found.get("seconds_a_step", {}), found.get("tokens_a_step", 1)
    return [
        run | {"seconds": [t / tokens * steps[run["name"]] for t in run["tokens"]]}
        if run["name"] in steps
        else run
        for run in found["runs"]
    ]


def _write_table(runs: Sequence[Run], page: Path) -> None:
    """Held-out losses at equal tokens and at equal minutes, into a page that has a place for it."""
    if not page.exists() or START not in (text := page.read_text(encoding="utf-8")):
        return
    before, rest = text.split(START, 1)
    after = rest.split(END, 1)[1]
    tokens = [run["tokens"][-1] for run in runs]
    least = min(tokens)
    minutes = min(run["seconds"][-1] for run in runs) / 60
    lines = [
        f"| recipe | s a step | at {least // 2:,} tokens | at {least:,} tokens "
        f"| after {minutes:.1f} minutes |",
        "|---|---|---|---|---|",
    ]
    for run in sorted(runs, key=lambda run: run["loss"][-1]):
        each = run["seconds"][-1] / run["tokens"][-1] * 1024
        row = [_at(run, "tokens", least / 2), _at(run, "tokens", least)]
        row.append(_at(run, "seconds", 60 * minutes))
        lines.append(
            f"| {run['name']} | {each:.1f} | " + " | ".join(f"{x:.3f}" for x in row) + " |"
        )
    table = "\n".join(lines)
    page.write_text(f"{before}{START}\n\n{table}\n\n{END}{after}", encoding="utf-8")


def _at(run: Run, axis: str, place: float) -> float:
    """The loss at a place of an axis, between looks on a straight line."""
    points = list(zip(run[axis], run["loss"], strict=True))
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= place <= x1:
            return y0 + (y1 - y0) * (place - x0) / (x1 - x0)
    return points[-1][1]


def _healing(runs: Sequence[Run]) -> Figure:
    """Mean held-out loss against tokens, and against minutes."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, run in enumerate(runs):
        _line(left, run["tokens"], run["loss"], place, run["name"])
        _line(right, [one / 60 for one in run["seconds"]], run["loss"], place, run["name"])
    plain(left, "tokens trained on")
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
    plain(right, "minutes")
    left.set_ylabel("held-out loss, nats a token, mean of the domains", fontsize=9)
    _legend(figure, left)
    return figure


def _learning(runs: Sequence[Run]) -> Figure:
    """Mean held-out loss against tokens, training of gates and healing in one line."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for place, run in enumerate(runs):
        _line(axes, run["tokens"], run["loss"], place, run["name"])
    axes.set_ylim(top=5)  # what lies above is lost
    plain(axes, "tokens trained on")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
    axes.set_ylabel("held-out loss, nats a token, mean of the domains", fontsize=9)
    _legend(figure, axes)
    return figure


def _mix(runs: Sequence[Run]) -> Figure:
    """Excess over the reference under constant and under dynamic weights, and those weights."""
    constant = next((run for run in runs if not _moves(run)), None)
    dynamic = next((run for run in runs if _moves(run)), None)
    if constant is None or dynamic is None:
        raise SystemExit("mix.json needs a run whose weights stay and one whose weights move")
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    axes[1].sharey(axes[0])
    domains = list(dynamic["losses"])
    for here, run in zip(axes[:2], (constant, dynamic), strict=True):
        for place, domain in enumerate(domains):
            reference = run["reference"][domain]
            excess = [loss - reference for loss in run["losses"][domain]]
            _line(here, run["tokens"], excess, place, domain)
        here.axhline(0, color="#333333", linewidth=1, dashes=(4, 3), zorder=1)
        here.set_title(f"{run['name']}: excess over reference", loc="left", fontsize=10)
    for place, domain in enumerate(domains):
        _line(axes[2], dynamic["tokens"], dynamic["weights"][domain], place, domain)
    axes[2].set_ylim(bottom=0)
    axes[2].set_title(f"{dynamic['name']}: share of the batch", loc="left", fontsize=10)
    axes[0].set_ylabel("nats a token", fontsize=9)
    for here in axes:
        plain(here, "tokens trained on")
        here.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
    axes[1].tick_params(labelleft=False)
    _legend(figure, axes[0])
    return figure


def _moves(run: Run) -> bool:
    return any(max(shares) - min(shares) > MOVED for shares in run["weights"].values())


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], place: int, label: str) -> None:
    axes.plot(
        x, y, label=label, color=COLOURS[place % len(COLOURS)],
        marker=MARKERS[(place + place // len(MARKERS)) % len(MARKERS)], markersize=4.5,
        markeredgecolor="#ffffff", markeredgewidth=0.6, linewidth=1.6,
        markevery=max(1, len(x) // DENSE),
    )  # fmt: skip


def plain(axes: Axes, label: str) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(label, fontsize=9)
    axes.grid(axis="y", alpha=0.3)
    axes.tick_params(labelsize=8, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = min(len(labels), 7)
    figure.legend(
        handles, labels, frameon=False, loc="outside upper left", ncols=columns, fontsize=9
    )


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    main(
        given[0] if given else HERE / "results",
        given[1] if len(given) > 1 else HERE.parent / "docs",
    )
