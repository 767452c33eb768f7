"""The section on comparisons: a drawing and a table for every panel."""

from __future__ import annotations

import math

from shearling.report.draw.markup import Markup, el
from shearling.report.draw.plots import Span, dots_plot, is_shown
from shearling.report.draw.sections import scroll, section
from shearling.report.draw.vector import drawing
from shearling.report.numbers import count, exact, figure
from shearling.report.pages.charts import glyph, series_key
from shearling.report.records.comparison import Comparison, Entry, Panel, Speed, Value
from shearling.report.records.results import Results

SHOWN = 0.9  # of all values lie on the axis for sure; one far above is written at its edge instead
ABOVE = 1.5  # times that quantile, the axis may go on
ROW, AROUND = 25, 60  # CSS pixels: of a line of the drawing, and of what stands around them
LETTER = 7.2  # CSS pixels of a name's letter, roughly


def comparisons_section(results: Results) -> Markup | None:
    """All comparisons that were given; nothing without one."""
    if not results.comparisons:
        return None
    alone = not results.models and len(results.comparisons) == 1  # the page bears its title
    panels = [_shown(*pair, titled=not alone) for pair in enumerate(results.comparisons)]
    return section("Comparison", panels)


def _shown(place: int, one: Comparison, *, titled: bool) -> Markup:
    measure, heading = next(iter(one.measures.items()))
    span = _span(one, measure)
    entries = [entry for panel in one.panels for entry in panel.entries]
    left = 16 + round(LETTER * max((len(entry.label) for entry in entries), default=0))
    off = [entry for entry in entries if entry.number(measure) > span.high]
    lines = [one.note] if one.note else []
    lines.append(
        f"Lower is better{', logarithmic scale' if span.log else ''}; in each panel the lines are "
        f"ordered by the best {heading} of any variant."
    )
    if off:
        lines.append("A value at the right edge lies beyond the scale.")
    intact = one.baseline.number(measure) if one.baseline else math.nan
    mark = () if math.isnan(intact) else _baseline_key(one, intact)
    return el(
        "article",
        el("h3", one.title) if titled else None,
        el("p", " ".join(lines), class_="small muted"),
        series_key(one.series, *mark) if any(one.series) or mark else None,
        [
            _panel(one, panel, f"comparison-{place}-{n}", span, left)
            for n, panel in enumerate(one.panels)
        ],
        class_="comparison",
    )


def _baseline_key(one: Comparison, value: float) -> tuple[Markup, ...]:
    name = one.baseline.label if one.baseline else ""
    line = '<path d="M6 0V12" stroke-width="1.500" stroke-dasharray="3 2.500"/>'
    return (el("li", glyph(line, "ink", 12), f"{name}, {figure(value)}"),)


def _span(one: Comparison, measure: str) -> Span:
    """One axis for all panels, so that they compare."""
    entries = [entry for panel in one.panels for entry in panel.entries]
    entries += [one.baseline] if one.baseline else []
    values = [value for entry in entries if is_shown(value := entry.number(measure))]
    low, high = min(values, default=1.0), max(values, default=2.0)
    if low > 0 and high / low > 2:
        high = min(high, ABOVE * sorted(values)[int(SHOWN * (len(values) - 1))])
        pad = (high / low) ** 0.04
        return Span(low / pad, high * pad, True)
    pad = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return Span(low - pad, high + pad, False)


def _panel(one: Comparison, panel: Panel, prefix: str, span: Span, left: int) -> Markup:
    measure, heading = next(iter(one.measures.items()))
    labels = panel.labels(measure)
    rows = [
        [
            next(
                (e.number(measure) for e in panel.entries if (e.label, e.series) == (label, of)),
                math.nan,
            )
            for of in one.series
        ]
        for label in labels
    ]
    intact = one.baseline.number(measure) if one.baseline else None
    draw = dots_plot(labels, rows, span, intact, heading)
    words = f"{panel.name}: {heading} of " + ", ".join(labels)
    height = AROUND + ROW * len(labels)
    return el(
        "figure",
        el("figcaption", el("h4", panel.name), _speeds(panel, one)),
        drawing(draw, prefix, words, height=height, narrow_height=height, left=left),
        _table(one, panel, labels),
    )


def _speeds(panel: Panel, one: Comparison) -> Markup | None:
    """Tokens a second of this panel's shape, and how that compares with the baseline."""
    before = {speed.batch: speed for speed in one.baseline_speeds}
    parts = [_speed(speed, before.get(speed.batch)) for speed in panel.speeds]
    said = [part for part in parts if part]
    return el("p", f"Decode: {'; '.join(said)}.", class_="small muted") if said else None


def _speed(speed: Speed, before: Speed | None) -> str:
    if speed.decode is None:
        return ""
    against = before.decode if before else None
    ratio = f" ({speed.decode / against:.2f}×)" if against else ""
    return f"{figure(speed.decode)} tokens/s{ratio} at batch {speed.batch}"


def _table(one: Comparison, panel: Panel, labels: list[str]) -> Markup:
    """Lines in the drawing's order, each with its variants; the best of a measure is bold."""
    order = {name: place for place, name in enumerate(one.series)}
    entries = sorted(panel.entries, key=lambda e: (labels.index(e.label), order[e.series]))
    entries = [*([one.baseline] if one.baseline else []), *entries]
    wanted = {**one.measures, **one.columns}
    keys = [key for key in wanted if any(key in entry.values for entry in entries)]
    best = {
        key: min((e.number(key) for e in panel.entries if is_shown(e.number(key))), default=None)
        for key in one.measures
    }
    variants = any(one.series)
    head = [el("th", "", scope="col")] + [el("th", "", scope="col")] * variants
    head += [el("th", wanted[key], scope="col") for key in keys]
    body, above = [], ""
    for entry in entries:
        named = entry.label if entry.label != above else ""
        above = entry.label
        series = entry.series if entry is not one.baseline else ""
        cells = [_cell(entry, key, best.get(key)) for key in keys]
        label = [el("th", named or el("span", entry.label, class_="unseen"), scope="row")]
        label += [el("td", series, class_="variant")] * variants
        body.append(el("tr", label, cells, class_=None if named else "same"))
    table = el("table", el("thead", el("tr", head)), el("tbody", body), class_="plain trials")
    return el("details", el("summary", "The numbers"), scroll(table, panel.name), open=True)


def _cell(entry: Entry, key: str, best: float | None) -> Markup:
    value = entry.values.get(key)
    text = "–" if value is None else written(value)
    is_best = best is not None and value == best
    return el("td", el("b", text) if is_best else text)


def written(value: Value) -> str:
    """A value of a row: large whole numbers in short."""
    if isinstance(value, str):
        return value
    whole = math.isfinite(value) and value == int(value)
    if whole and abs(value) >= 1e6:
        return count(int(value))
    return exact(int(value)) if whole else figure(value)
