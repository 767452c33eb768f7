"""The plots of the documentation, from results such as the benchmarks write."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setitem(__import__("matplotlib").rcParams, "svg.fonttype", "none")
    return __import__(name)


def texts(svg: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg.read_text(encoding="utf-8"))


def test_one_shot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(axis: str, removed: int, by: str, repair: str, c4: float) -> dict[str, Any]:
        return {
            "axis": axis, "removed": removed, "criterion": by, "repair": repair, "c4": c4,
            "wikitext2": 1.5, "parameters": 100_000_000,
        }  # fmt: skip

    rows = [
        row("dense", 0, "dense", "none", 35.9),
        row("depth", 20, "repair", "none", 70.1),
        row("depth", 20, "repair", "refit", 50.2),
        row("depth", 20, "taylor", "none", 123_456.0),
    ]
    speed = [
        {"criterion": "dense", "batch": 1, "decode_tokens_per_s": {"median": 17.25}},
        {"axis": "depth", "removed": 20, "batch": 1, "decode_tokens_per_s": {"median": 21.5}},
    ]
    (tmp_path / "one_shot.md").write_text("before\n<!-- table -->old<!-- end of table -->\nafter\n")
    (tmp_path / "r.json").write_text(json.dumps({"rows": rows, "speed": speed}))
    script("plot_one_shot", monkeypatch).main(tmp_path / "r.json", tmp_path)
    page = (tmp_path / "one_shot.md").read_text().splitlines()
    assert (page[0], page[-1]) == ("before", "after")
    cells = [[one.strip() for one in line.split("|")[1:-1]] for line in page if line[:1] == "|"]
    assert {len(line) for line in cells} == {10}
    assert cells[0][-1] == "decode, batch 1, tokens/s"
    assert [line[-1] for line in cells[2:]] == ["17.2", "21.5", "21.5", "21.5"]
    drawn = texts(tmp_path / "one_shot.svg")
    assert {"36", "50", "70", "100", "200", "120,000 →", "repair", "taylor"} <= set(drawn)
    # without speeds, no columns of them
    (tmp_path / "r.json").write_text(json.dumps({"rows": rows}))
    script("plot_one_shot", monkeypatch).main(tmp_path / "r.json", tmp_path)
    assert "decode" not in (tmp_path / "one_shot.md").read_text()


def run(name: str, moves: bool) -> dict[str, Any]:
    return {
        "name": name, "recipe": "cpt", "tokens": [0, 1000, 2000], "seconds": [0, 60, 120],
        "loss": [3.0, 2.5, 2.2], "losses": {"fell": [3.0, 2.4, 2.1], "pen": [3.0, 2.6, 2.3]},
        "weights": {"fell": [0.5, 0.5, 0.5 - 0.1 * moves], "pen": [0.5, 0.5, 0.5 + 0.1 * moves]},
        "reference": {"fell": 2.0, "pen": 2.0},
    }  # fmt: skip


def test_healing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("plot_healing", monkeypatch)
    module.main(tmp_path, tmp_path)  # nothing there, nothing drawn
    assert list(tmp_path.iterdir()) == []
    runs = [run("CPT", False), run("dynamic mix", True)]
    for name in ("healing", "mix"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"runs": runs}))
    module.main(tmp_path, tmp_path)
    assert {"CPT", "dynamic mix", "minutes", "2\u202fK"} <= set(texts(tmp_path / "healing.svg"))
    drawn = set(texts(tmp_path / "mix.svg"))
    assert {"CPT: excess over reference", "dynamic mix: share of the batch", "fell", "pen"} <= drawn
    lines = module._mix(runs).axes[0].get_lines()
    assert list(lines[0].get_ydata()) == pytest.approx([1.0, 0.4, 0.1])
    with pytest.raises(SystemExit, match="weights move"):
        module._mix(runs[:1])
