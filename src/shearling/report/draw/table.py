"""The before/after table."""

from __future__ import annotations

from collections.abc import Callable

from shearling.report.decide.compare import Cell, Row, groups
from shearling.report.draw.markup import Markup, el
from shearling.report.draw.numbers import exact
from shearling.report.draw.sections import absent, breakable, scroll, section, with_commands
from shearling.report.records.results import Model, Results


def comparison_section(results: Results) -> Markup:
    """Every measure of every model, with its change against the source."""
    title = "Before and after" if results.made else "Measurements"
    found = groups(results)
    if not (results.made or results.evaluations or results.runs):
        return absent(title, "None yet: `shearling eval MODEL` and `shearling bench MODEL`.")
    missing = [
        (not results.evaluations, "No perplexity yet: `shearling eval MODEL` measures it."),
        (
            not results.runs,
            "No speed and memory yet: `shearling bench MODEL` measures them.",
        ),
    ]
    lines = [
        el("p", with_commands(sentence), class_="small muted")
        for is_missing, sentence in missing
        if is_missing
    ]
    return section(title, figures_table(results, found, title), lines)


def figures_table(
    results: Results,
    found: list[tuple[str, list[Row]]],
    title: str,
    role: Callable[[Model], str] | None = None,
) -> list[Markup]:
    """The rows of :func:`groups` as a table, with a line that says how to read it.

    Args:
        role: what stands below a model's name; by default how it was made.
    """
    return [
        scroll(_table(results, found, role or _role), title),
        el("p", _units(results), class_="small muted"),
    ]


def _table(
    results: Results, found: list[tuple[str, list[Row]]], role: Callable[[Model], str]
) -> Markup:
    head = [
        el("th", breakable(model.name), el("small", role(model)), scope="col")
        for model in results.models
    ]
    body = []
    for heading, rows in found:
        span = len(results.models) + 1
        body.append(el("tr", el("th", heading, colspan=span, scope="rowgroup"), class_="group"))
        body += [_row(row) for row in rows]
    return el("table", el("thead", el("tr", el("td"), head)), el("tbody", body))


def _role(model: Model) -> str:
    if model.manifest is not None:
        return model.manifest.stage
    return "source" if model.role == "source" else "for comparison, not made of it"


def _row(row: Row) -> Markup:
    note = el("small", row.note) if row.note else None
    return el("tr", el("th", row.label, note, scope="row"), [_cell(cell) for cell in row.cells])


def _cell(cell: Cell | None) -> Markup:
    if cell is None:
        return el("td", el("span", "–", class_="muted", title="not measured"))
    lines: list[object] = [cell.value]
    if cell.spread:
        lines.append(el("small", cell.spread))
    if cell.change:
        kind = {True: "better", False: "worse", None: None}[cell.change.better]
        lines.append(el("small", cell.change.text, class_=kind))
    return el("td", lines)


def _units(results: Results) -> str:
    sentences = []
    if results.source and len(results.models) > 1:
        sentences.append(
            f"Second lines compare with {results.source.name}: change in per cent, and ratio. "
            "In colour: a change for the worse; in grey: one within the spread of the runs, or "
            "of no merit by itself."
        )
    if any(model.bytes is not None for model in results.models):
        sentences.append("On disk, 1 MB is 10⁶ bytes.")
    if any(run.peak_memory is not None for run in results.runs):
        sentences.append("In memory, 1 MiB is 2²⁰ bytes.")
    machines = sorted({run.machine for run in results.runs})
    repeats = sorted({run.repeats for run in results.runs})
    if machines:
        times = " or ".join(exact(number) for number in repeats)
        sentences.append(
            f"Speeds are medians of {times} runs, with the slowest and fastest below. "
            f"Machine: {'; '.join(machines)}."
        )
    return " ".join(sentences)
