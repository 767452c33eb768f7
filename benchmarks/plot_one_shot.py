"""docs/one_shot.md's plot and table, from results/one_shot.json.

python benchmarks/plot_one_shot.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
START, END = "<!-- table -->", "<!-- end of table -->"
STYLE = {"none": ("#9aa0a6", "cut"), "refit": ("#4c78a8", "repaired"),
         "refit+text": ("#d1495b", "repaired, on the model's own text as well")}  # fmt: skip


def main() -> None:
    """Draw and write."""
    rows = json.loads((HERE / "results" / "one_shot.json").read_text())["rows"]
    _plot([row for row in rows if row["axis"] != "dense"])
    page = DOCS / "one_shot.md"
    before, _, rest = page.read_text().partition(START)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{START}\n\n{_table(rows)}\n\n{END}{after}")


def _plot(rows: list[dict[str, Any]]) -> None:
    matplotlib.rcParams["svg.hashsalt"] = "shearling"
    panels = sorted({(row["removed"], row["axis"]) for row in rows})
    names = {p: _names(rows, *p) for p in panels}
    figure = Figure(figsize=(8, 1 + 0.27 * sum(map(len, names.values()))), layout="constrained")
    ratios = [len(names[p]) + 1 for p in panels]
    for axes, panel in zip(
        figure.subplots(len(panels), 1, height_ratios=ratios, squeeze=False)[:, 0], panels,
        strict=True,
    ):  # fmt: skip
        removed, axis = panel
        for row in rows:
            if (row["removed"], row["axis"]) == panel:
                colour, label = STYLE[row["repair"]]
                at = names[panel].index(row["criterion"])
                axes.plot(row["c4"], at, "o", color=colour, label=label, markersize=6)
        axes.set_yticks(range(len(names[panel])), names[panel])
        axes.set_xscale("log")
        axes.invert_yaxis()
        axes.set_title(f"{axis}, -{removed} % of block parameters", loc="left", fontsize=10)
        axes.grid(axis="x", which="both", alpha=0.3)
        axes.tick_params(axis="x", which="both", labelsize=8)
    axes.set_xlabel("perplexity on held-out c4 (dense 35.9), lower is better")
    found = dict(zip(*reversed(_legend(figure)), strict=True))
    figure.legend(found.values(), found.keys(), frameon=False, loc="outside upper right", ncols=3)
    figure.savefig(DOCS / "one_shot.svg", format="svg", metadata={"Date": None})


def _legend(figure: Figure) -> tuple[list[Any], list[str]]:
    handles, labels = [], []
    for axes in figure.axes:
        more, names = axes.get_legend_handles_labels()
        handles, labels = handles + more, labels + names
    return handles, labels


def _names(rows: list[dict[str, Any]], removed: int, axis: str) -> list[str]:
    """Criteria of a panel, the best first."""
    best: dict[str, float] = {}
    for row in rows:
        if (row["removed"], row["axis"]) == (removed, axis):
            best[row["criterion"]] = min(row["c4"], best.get(row["criterion"], row["c4"]))
    return sorted(best, key=lambda name: best[name])


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| cut | criterion | repair | parameters | c4 | WikiText-2 | choosing, s | repairing, s "
        "| peak, MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: (r["removed"], r["axis"], r["c4"])):
        cut = "dense" if row["axis"] == "dense" else f"-{row['removed']} % {row['axis']}"
        lines.append(
            f"| {cut} | {row['criterion'] if row['axis'] != 'dense' else ''} | {row['repair']} "
            f"| {row['parameters'] / 1e6:.1f} M | {row['c4']} | {row['wikitext2']} "
            f"| {row.get('seconds_choosing', '')} | {row.get('seconds_repairing', '')} "
            f"| {row.get('peak_mib', '')} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
