"""Comparison records: read as they say themselves, drawn to scale, refused where damaged."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from sample_run import SampleRun

from shearling.errors import ShearlingError
from shearling.report import collect, page
from shearling.report.draw.plots import Span, dots_plot, log_ticks

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
HEADER: dict[str, Any] = {
    "kind": "comparison", "shearling": "0", "created": "2026-11-22T00:00:00+00:00",
    "title": "Ways to shear", "note": "On a dry day.", "panel": ["removed", "axis"],
    "panel_name": "{axis}, minus {removed}", "label": "by", "series": "repair",
    "order": ["none", "refit"], "baseline": "dense",
    "measures": {"c4": "perplexity on c4", "wiki": "perplexity on wiki"},
    "columns": {"parameters": "parameters", "s": "seconds"},
}  # fmt: skip


def row(axis: str, removed: int, by: str, repair: str, c4: float | None, **more: Any) -> Any:
    return {"axis": axis, "removed": removed, "by": by, "repair": repair, "c4": c4, **more}


ROWS = [
    {"by": "dense", "repair": "none", "c4": 35.86, "wiki": 33.9, "parameters": 134_515_008},
    row("width", 40, "flap", "refit", 95.0, wiki=110.5, s=3.0),
    row("width", 20, "flap", "refit", 55.5, wiki=70.25, s=3.0),
    row("width", 20, "flap", "none", 99.75, wiki=120.5),
    row("width", 20, "random", "none", 4_000_000.0, wiki=None),
    row("width", 20, "obs", "none", 60.0),
    row("depth", 20, "taylor", "none", 70.0),
]
SPEED = [
    {"by": "dense", "batch": 8, "decode_tokens_per_s": 50.0},
    {"axis": "width", "removed": 20, "batch": 8, "prefill_tokens_per_s": 700.0,
     "decode_tokens_per_s": {"median": 60.0, "min": 59.0, "max": 61.0}},
]  # fmt: skip


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    values = HEADER | {"rows": ROWS, "speed": SPEED} | changes
    kept = {key: value for key, value in values.items() if value is not ...}
    (folder / "any-name.json").write_text(json.dumps(kept))
    return folder


class Cells(HTMLParser):
    """Rows of every table, as lists of texts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.bold: list[str] = []
        self.tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self.tags and self.tags.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.tags) and self.tables and self.tables[-1]:
            self.tables[-1][-1][-1] += data
            if "b" in self.tags:
                self.bold.append(data)


def test_rows_are_put_where_the_file_says(tmp_path: Path) -> None:
    (found,) = collect([write(tmp_path)]).comparisons
    assert [panel.name for panel in found.panels] == [
        "depth, minus 20", "width, minus 20", "width, minus 40",
    ]  # fmt: skip
    assert [len(panel.entries) for panel in found.panels] == [1, 4, 1]
    assert found.series == ("none", "refit")
    assert found.baseline is not None
    assert found.baseline.number("c4") == 35.86
    middle = found.panels[1]
    assert middle.labels("c4") == ["flap", "obs", "random"]  # by the best of the variants
    assert math.isnan(middle.entries[2].number("wiki"))
    assert [(one.batch, one.decode, one.prefill) for one in middle.speeds] == [(8, 60.0, 700.0)]
    assert [(one.batch, one.decode) for one in found.baseline_speeds] == [(8, 50.0)]
    assert found.panels[2].speeds == ()


def test_a_comparison_alone_makes_a_page(tmp_path: Path) -> None:
    html = page(collect([write(tmp_path)]))
    assert "<h1>Ways to shear " in html
    assert 'class="absent"' not in html
    assert "60.0 tokens/s (1.20×) at batch 8" in html
    assert html.count('class="plot wide"') == 3
    read = Cells(html)
    middle = read.tables[1]
    assert middle[0] == ["", "", "perplexity on c4", "perplexity on wiki", "parameters", "seconds"]
    assert middle[1] == ["dense", "", "35.9", "33.9", "134.5\u202fM", "–"]
    assert middle[2:] == [
        ["flap", "none", "99.8", "120", "–", "–"],
        ["flap", "refit", "55.5", "70.2", "–", "3"],
        ["obs", "none", "60", "–", "–", "–"],
        ["random", "none", "4.00\u202fM", "–", "–", "–"],
    ]
    # the best of each panel and measure: depth 20, width 20 (both measures), width 40 (both)
    assert read.bold == ["70", "55.5", "70.2", "95", "110"]


def test_beside_models(tmp_path: Path) -> None:
    sample = SampleRun(tmp_path / "run")
    sample.write_all()
    html = page(collect([sample.root, write(tmp_path / "more")]))
    assert "SmolLM2-135M, 30" in html
    assert "<h3>Ways to shear</h3>" in html


def test_without_variants_baseline_or_speed(tmp_path: Path) -> None:
    write(tmp_path, series=..., baseline=..., speed=..., order=..., rows=ROWS[1:3])
    html = page(collect([tmp_path]))
    assert Cells(html).tables[0][0] == ["", "perplexity on c4", "perplexity on wiki", "seconds"]


def test_what_is_no_number_and_what_is_markup(tmp_path: Path) -> None:
    rows = [row("a", 1, "<script>x</script>", "none", math.inf), row("a", 1, "b", "refit", None)]
    write(tmp_path, rows=rows, title="<script>y</script>")
    html = page(collect([tmp_path]))
    assert "<script" not in html
    assert "∞" in html


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measures": {}}, "measures is {} where at least one key"),
        ({"measures": ...}, "measures is missing where at least one key"),
        ({"panel": [3]}, r"panel is \[3\] where a list of keys"),
        ({"title": None}, "title is None where a text"),
        ({"rows": [{"by": "x", "repair": "none", "axis": "a"}]}, r"rows\[0\]\.removed is missing"),
        ({"rows": [row("a", 1, "x", "none", None, s=[2])]}, r"rows\[0\]\.s is \[2\]"),
        ({"speed": [{"by": "dense"}]}, r"speed\[0\]\.batch is missing"),
        (
            {"speed": [{"by": "dense", "batch": 1, "decode_tokens_per_s": {"median": "fast"}}]},
            r"decode_tokens_per_s\.median is 'fast' where a number",
        ),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(ShearlingError, match=message):
        collect([write(tmp_path, **change)])


def test_dots_lie_at_the_values_and_those_beyond_are_written() -> None:
    axes = Figure().add_subplot()
    rows = [(50.0, 40.0), (2e5, 90.0), (math.nan, math.inf)]
    dots_plot(["a", "b", "c"], rows, Span(35, 200, True), 36.0, "perplexity")(axes, False)
    dots = {
        (float(line.get_xdata()[0]), float(line.get_ydata()[0]))  # ty: ignore[not-subscriptable]
        for line in axes.get_lines()
        if line.get_marker() not in ("None", None, "")
    }
    assert dots == {(50.0, 0.0), (40.0, 0.0), (90.0, 1.0)}
    notes = [one for one in axes.texts if isinstance(one, Annotation)]
    assert [(one.xy[1], one.get_text()) for one in notes] == [(1, "200\u202f000 →"), (2, "∞ →")]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("low", "high", "most", "also", "expected"),
    [
        (33, 1100, 10, 35.86, [35.86, 50, 70, 100, 150, 200, 300, 500, 700, 1000]),
        (33, 1100, 6, 35.86, [35.86, 100, 200, 500, 1000]),
        (33, 250, 10, None, [50, 70, 100, 150, 200]),
        (1, 1e6, 8, None, [1, 10, 100, 1e3, 1e4, 1e5, 1e6]),
        (0.9, 4.0, 10, None, [1, 1.5, 2, 3]),
        (1, 1e9, 5, None, [1, 100, 1e4, 1e6, 1e8]),
    ],
)
def test_ticks_are_round_numbers(
    low: float, high: float, most: int, also: float | None, expected: list[float]
) -> None:
    assert log_ticks(low, high, most, also) == pytest.approx(expected)


def test_the_benchmark_writes_what_the_report_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    one_shot = importlib.import_module("one_shot")
    header: Mapping[str, Any] = one_shot.COMPARISON
    rows = json.loads((BENCHMARKS / "results" / "one_shot.json").read_text())["rows"]
    speed = [
        one_shot._place(name)
        | {"batch": 1, "decode_tokens_per_s": {"median": at, "min": at, "max": at}}
        for name, at in (("dense", 20.0), ("depth 20", 25.0))
    ]
    (tmp_path / "one_shot.json").write_text(json.dumps({**header, "rows": rows, "speed": speed}))
    (found,) = collect([tmp_path]).comparisons
    cuts = [one for one in rows if one["axis"] != "dense"]
    assert len(found.panels) == len({(one["axis"], one["removed"]) for one in cuts})
    assert sum(len(panel.entries) for panel in found.panels) == len(cuts)
    assert found.baseline is not None
    assert [one.decode for one in found.baseline_speeds] == [20.0]
    depth = next(panel for panel in found.panels if panel.name.startswith("depth, −20"))
    assert [one.decode for one in depth.speeds] == [25.0]
