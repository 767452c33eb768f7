"""The section on gates: their number over the run, where they ended, and held-out losses."""

from __future__ import annotations

from collections.abc import Callable

from shearling.report.decide.compare import AXES
from shearling.report.draw.markup import Markup, el, render
from shearling.report.draw.plots import Draw, histogram_plot, sizes_plot
from shearling.report.draw.sections import section
from shearling.report.draw.vector import drawing
from shearling.report.numbers import THIN, count, exact, figure, plural
from shearling.report.pages.charts import glyph
from shearling.report.pages.healing import held_out, numbers_table
from shearling.report.records.results import Results
from shearling.report.records.training import Gated, Learning

MISSED = 0.02  # of the open probability: from here on the run had not settled, as it says itself
WIDTHS = {1: 440, 2: 440, 3: 290}  # of a small drawing, in CSS pixels, by how many are in a row


def learning_section(results: Results) -> Markup | None:
    """Every run that learned what to keep; nothing without one."""
    runs = [one for one in results.learnings if one.axes]
    if not runs:
        return None
    intro = el(
        "p",
        "Every unit that might go had a gate, and gates were trained together with the weights; "
        "those that were open in the end were kept.",
    )
    return section("Learning", intro, [_run(results, *pair) for pair in enumerate(runs)])


def _run(results: Results, place: int, one: Learning) -> Markup:
    name = results.name_of(one.model.fingerprint)
    tokens = f", {count(one.held_out.tokens[-1])} tokens" if one.held_out.tokens else ""
    parts = [el("h3", f"{name}, {one.gates} gates{tokens}")]
    if one.steps:
        parts += _sizes(one, f"sizes-{place}")
    parts += _ends(one, f"gates-{place}")
    parts.append(_numbers(one))
    if one.held_out.tokens:
        parts += [
            el("h4", "Held-out text"),
            el(
                "p",
                "Loss of the model with its gates, in nats a token: it shrinks while it is "
                "trained. Lower is better.",
                class_="small muted",
            ),
            *held_out(results, f"learning-{place}", one.held_out),
        ]
    return el("article", parts, class_="learning")


def _sizes(one: Learning, prefix: str) -> list[Markup]:
    """How many gates were open over the run, an axis a drawing."""
    curve = '<path d="M0 6H30" stroke-width="2"/>'
    band = '<path d="M0 6H30" stroke-width="6"/>'
    line = '<path d="M0 6H30" stroke-width="1.500" stroke-dasharray="6 3.500"/>'
    key = el(
        "ul",
        el("li", glyph(curve, "series-1"), "open, on average"),
        el("li", glyph(band, "bar"), "wanted at that step"),
        el("li", glyph(line, "ink"), "target"),
        class_="key",
    )

    def title(axis: Gated) -> str:
        return f"{_row(one, axis)}, {exact(axis.units)} → {exact(axis.target)}"

    def draw(axis: Gated) -> Draw:
        return sizes_plot(one.steps, axis.expected, axis.wanted, axis.target, axis.units)

    return [el("h4", "How many are open"), key, _grid(one, prefix, title, draw)]


def _ends(one: Learning, prefix: str) -> list[Markup]:
    """Where the gates ended, and what the cut closed of what was open."""
    bins = plural(len(one.axes[0].histogram), "equal part")
    text = (
        f"Gates by their probability of being open at the end, in {bins}. Gates that have settled "
        "lie at the two ends; what lies between, the cut decides."
    )

    def title(axis: Gated) -> Markup:
        share = f"{100 * axis.lost:.{0 if axis.lost >= 0.095 else 1}f}{THIN}%"
        said = el("span", f"the cut closed {share} of what was open", class_=_cost(axis))
        return render([f"{AXES.get(axis.axis, axis.axis)}: ", said])

    def draw(axis: Gated) -> Draw:
        return histogram_plot(axis.histogram, "P(open)")

    return [
        el("h4", "Where they ended"),
        el("p", text, class_="small muted"),
        _grid(one, prefix, title, draw),
    ]


def _cost(axis: Gated) -> str:
    return "worse" if axis.lost > MISSED else "muted"


def _grid(
    one: Learning, prefix: str, title: Callable[[Gated], str], draw: Callable[[Gated], Draw]
) -> Markup:
    """A small drawing an axis, two or three in a row."""
    columns = 3 if len(one.axes) in (3, 5, 6) else min(2, len(one.axes))
    drawn = [
        el(
            "figure",
            el("figcaption", title(axis), class_="small"),
            drawing(
                draw(axis), f"{prefix}-{axis.axis}", f"{AXES.get(axis.axis, axis.axis)} of gates",
                height=180, narrow_height=160, width=WIDTHS[columns],
            ),
        )
        for axis in one.axes
    ]  # fmt: skip
    return el("div", drawn, class_="small-multiples", style=f"--columns:{max(2, columns)}")


def _row(one: Learning, axis: Gated) -> str:
    """ "MLP neurons in each block": among which units a size has to hold."""
    label = AXES.get(axis.axis, axis.axis)
    if axis.axis in ("layers", "hidden"):
        return label
    in_groups = axis.units < one.shape.get(axis.axis, axis.units)
    return f"{label} in each {'group' if in_groups else 'block'}"


def _numbers(one: Learning) -> Markup:
    """Of every axis: sizes at the end, and what was lost."""
    multiplied = any(axis.multipliers for axis in one.axes)
    heads = ["", "units", "target", "open at the end", *["multiplier"] * multiplied, "closed"]
    rows = []
    for axis in one.axes:
        values = [exact(axis.units), exact(axis.target)]
        values.append(figure(axis.expected[-1]) if axis.expected else "–")
        if multiplied:
            values.append(figure(axis.multipliers[-1]) if axis.multipliers else "–")
        values.append(f"{100 * axis.lost:.1f}{THIN}%")
        rows.append(
            el("tr", el("th", _row(one, axis), scope="row"), [el("td", one) for one in values])
        )
    return numbers_table(heads, rows, "Gates by axis")
