"""The section of unit scores: by block, how far the units of a width are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from shearling.report.decide.compare import AXES
from shearling.report.draw.markup import Markup, el
from shearling.report.draw.sections import scroll, section
from shearling.report.numbers import exact, figure
from shearling.report.pages.charts import in_words
from shearling.report.records.fields import describe
from shearling.report.records.results import Model, Results
from shearling.report.records.unit_scores import ScoredUnits


def unit_scores_section(results: Results) -> Markup | None:
    """A table for each axis and criterion that units were scored on; None without any."""
    if not results.unit_scores:
        return None
    intro = el(
        "p",
        "The higher a unit’s score, the more its removal hurts; in each block the lowest go "
        "first. Only scores of one block compare.",
    )
    return section("Scores of units", intro, [_scored(results, one) for one in results.unit_scores])


def _scored(results: Results, one: ScoredUnits) -> Markup:
    axis = AXES.get(one.axis, one.axis)
    parts = [in_words(one.criterion, "units"), f"of {exact(len(one.rows[0]))} {axis}"]
    parts.append("in each block" if len(one.rows) > 1 else "in all of the model")
    if len({units.model.fingerprint for units in results.unit_scores}) > 1:
        parts.append(f"of {results.name_of(one.model.fingerprint)}")
    sentence = ", ".join(parts) + "."
    if one.calibration is not None:
        sentence += f" Calibration: {describe(one.calibration)}."
    title = f"{one.criterion}, {axis}"
    return el(
        "figure",
        el("figcaption", el("h3", title), el("p", sentence, class_="small muted")),
        scroll(_table(results, one), f"Scores by block: {title}"),
    )


def _table(results: Results, one: ScoredUnits) -> Markup:
    """A row a block: the least score, the median, the most, and of a cut what it kept."""
    kept = _kept(results.primary, one)
    heads = ["block", "least", "median", "most", *(["units kept"] if kept else [])]
    rows = []
    for block, values in enumerate(one.rows):
        cells = [figure(value) for value in _spread(values)]
        if kept:
            cells.append(exact(kept[block]) if block in kept else "removed")
        name = block if len(one.rows) > 1 else "all"
        rows.append(el("tr", el("th", name, scope="row"), [el("td", cell) for cell in cells]))
    head = el("tr", [el("th", name, scope="col") for name in heads])
    return el("table", el("thead", head), el("tbody", rows), class_="plain")


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    numbers = [value for value in values if not math.isnan(value)]
    if not numbers:
        return math.nan, math.nan, math.nan
    return min(numbers), median(numbers), max(numbers)


def _kept(model: Model | None, one: ScoredUnits) -> dict[int, int]:
    """Row -> how many of its units the primary model has left; empty where that is not known."""
    if model is None:
        return {}
    if len(one.rows) == 1:
        channels = model.kept(one.axis, one.model.fingerprint)
        return {} if channels is None else {0: len(channels)}
    kept = model.kept_in_blocks(one.axis, one.model.fingerprint) or {}
    return {block: len(units) for block, units in kept.items()}
