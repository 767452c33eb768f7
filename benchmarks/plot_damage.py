"""The README's plot: perplexity against blocks removed, from a demo's damage.json.

python benchmarks/plot_damage.py demo/damage.json docs/damage.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure


def main(source: Path, target: Path) -> None:
    matplotlib.rcParams["svg.hashsalt"] = "shearling"
    damage = json.loads(source.read_text())
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    for curve, marker in zip(damage["curves"], "osD^v", strict=False):
        removed = [len(blocks) for blocks in curve["removed"]]
        axes.plot(removed, curve["perplexity"], marker=marker, label=curve["criterion"])
    axes.set_yscale("log")
    axes.set_xlabel("blocks removed, no repair")
    axes.set_ylabel("perplexity, held-out text")
    axes.set_title(f"{damage['windows']} windows of {damage['window']} tokens")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(target, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
