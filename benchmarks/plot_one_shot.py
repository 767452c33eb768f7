"""docs/one_shot.md's plot and table, from results/one_shot.json.

python benchmarks/plot_one_shot.py [RESULTS [DOCS]]
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from shearling.report.draw.plots import log_ticks

HERE = Path(__file__).parent
START, END = "<!-- table -->", "<!-- end of table -->"
STYLE = {"none": ("#9aa0a6", "cut"), "refit": ("#4c78a8", "repaired"),
         "refit+text": ("#d1495b", "repaired, on the model's own text as well")}  # fmt: skip
INK, WHITE = "#333333", "#ffffff"
CLIPPED = 12.0  # times the dense model's perplexity: what lies beyond is written at the edge
ROW, TITLE = 0.24, 0.62  # inches: of a criterion's line, and of what a panel has besides

Rows = list[dict[str, Any]]
Panel = tuple[int, str]


def main(source: Path, docs: Path) -> None:
    """Draw and write."""
    result = json.loads(source.read_text(encoding="utf-8"))
    rows = result["rows"]
    dense = next(row for row in rows if row["axis"] == "dense")
    _plot([row for row in rows if row is not dense], dense["c4"], docs / "one_shot.svg")
    page = docs / "one_shot.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    table = _table(rows, _speeds(result.get("speed", ())))
    page.write_text(f"{before}{START}\n\n{table}\n\n{END}{after}", encoding="utf-8")


def _plot(rows: Rows, dense: float, target: Path) -> None:
    """A panel for each size and axis, one scale for all; heights follow the number of lines."""
    matplotlib.rcParams["svg.hashsalt"] = "shearling"
    panels = sorted({(row["removed"], row["axis"]) for row in rows})
    names = {panel: _names(rows, panel) for panel in panels}
    heights = [TITLE + ROW * len(names[panel]) for panel in panels]
    figure = Figure(figsize=(8, 0.75 + sum(heights)), layout="constrained")
    figure.patch.set_facecolor(WHITE)  # a page of documentation may be dark
    highest = max((row["c4"] for row in rows), default=2 * dense)
    ends = (0.94 * dense, 1.06 * min(highest, CLIPPED * dense))
    all_axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, panel in zip(all_axes, panels, strict=True):
        here = [row for row in rows if (row["removed"], row["axis"]) == panel]
        _panel(axes, here, names[panel], dense, ends)
        axes.set_title(f"{panel[1]}, −{panel[0]} % of block parameters", loc="left", fontsize=10)
    all_axes[-1].set_xlabel(f"perplexity on held-out c4 (dense {dense:.1f}), lower is better")
    _legend(figure)
    figure.savefig(target, format="svg", metadata={"Date": None})


def _panel(
    axes: Axes, rows: Rows, names: list[str], dense: float, ends: tuple[float, float]
) -> None:
    for at, name in enumerate(names):
        found = {row["repair"]: row["c4"] for row in rows if row["criterion"] == name}
        shown = [value for value in found.values() if value <= ends[1]]
        if len(shown) > 1:
            axes.plot((min(shown), max(shown)), (at, at), color="#cccccc", zorder=1)
        for repair, value in found.items():
            colour, label = STYLE[repair]
            if value <= ends[1]:
                axes.plot(value, at, "o", color=colour, label=label, markersize=6, clip_on=False)
        beyond = sorted(value for value in found.values() if value > ends[1])
        if beyond:
            text = " … ".join(dict.fromkeys((_plain(beyond[0]), _plain(beyond[-1])))) + " →"
            axes.annotate(text, (ends[1], at), xytext=(-3, 0), textcoords="offset points",
                          ha="right", va="center", fontsize=8, color=INK)  # fmt: skip
    axes.axvline(dense, color=INK, linewidth=1, dashes=(3, 2.5), zorder=0)
    axes.set_xscale("log")
    axes.set_xlim(*ends)
    axes.set_xticks(log_ticks(*ends, most=9, also=dense))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(labelsize=8, length=0)
    axes.tick_params(axis="y", labelsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _plain(value: float) -> str:
    return f"{float(f'{value:.2g}'):,.0f}" if math.isfinite(value) else "∞"


def _legend(figure: Figure) -> None:
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    labels = [label for _, label in STYLE.values() if label in found]
    handles = [found[label] for label in labels]
    figure.legend(handles, labels, frameon=False, loc="outside upper left", ncols=3, fontsize=9)


def _names(rows: Rows, panel: Panel) -> list[str]:
    """Criteria of a panel, the best first."""
    best: dict[str, float] = {}
    for row in rows:
        if (row["removed"], row["axis"]) == panel:
            best[row["criterion"]] = min(row["c4"], best.get(row["criterion"], row["c4"]))
    return sorted(best, key=lambda name: best[name])


def _speeds(found: Any) -> dict[tuple[Any, int], float]:
    """(panel or "dense", batch) -> decoded tokens a second, the median."""
    speeds = {}
    for one in found:
        panel = (one["removed"], one["axis"]) if "removed" in one else "dense"
        speeds[panel, one["batch"]] = one["decode_tokens_per_s"]["median"]
    return speeds


def _table(rows: Rows, speeds: dict[tuple[Any, int], float]) -> str:
    batches = sorted({batch for _, batch in speeds})
    heads = ["cut", "criterion", "repair", "parameters", "c4", "WikiText-2", "choosing, s"]
    heads += ["repairing, s", "peak, MiB", *(f"decode, batch {b}, tokens/s" for b in batches)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in sorted(rows, key=lambda r: (r["removed"], r["axis"], r["c4"])):
        dense = row["axis"] == "dense"
        panel = "dense" if dense else (row["removed"], row["axis"])
        cells = [
            "dense" if dense else f"-{row['removed']} % {row['axis']}",
            "" if dense else row["criterion"],
            "" if dense else row["repair"],
            f"{row['parameters'] / 1e6:.1f} M",
            row["c4"], row["wikitext2"],
            *(row.get(key, "") for key in ("seconds_choosing", "seconds_repairing", "peak_mib")),
            *(f"{speeds[panel, b]:.1f}" if (panel, b) in speeds else "" for b in batches),
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    main(
        given[0] if given else HERE / "results" / "one_shot.json",
        given[1] if len(given) > 1 else HERE.parent / "docs",
    )
