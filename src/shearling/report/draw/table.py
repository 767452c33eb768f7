"""A table of figures: a column a model, a row a measure, with its change against the source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shearling.report.draw.markup import Markup, el
from shearling.report.draw.sections import breakable, scroll
from shearling.report.numbers import exact
from shearling.report.records.results import Model, Results


@dataclass(frozen=True)
class Change:
    """A value against the source's. ``better`` is None where there is no telling."""

    percent: str
    ratio: str
    better: bool | None

    @property
    def text(self) -> str:
        """As it stands in the table."""
        return f"{self.percent} · {self.ratio}"


@dataclass(frozen=True)
class TableCell:
    """One value of the table, as written."""

    value: str
    spread: str | None = None
    change: Change | None = None


@dataclass(frozen=True)
class TableRow:
    """One line of the table: a cell for each model, None where nothing was measured."""

    label: str
    note: str
    cells: tuple[TableCell | None, ...]


def figures_table(
    results: Results,
    groups: list[tuple[str, list[TableRow]]],
    title: str,
    role: Callable[[Model], str] | None = None,
) -> list[Markup]:
    """Rows under their headings as a table, with a line that says how to read it.

    Args:
        role: what stands below a model's name; by default how it was made.
    """
    return [
        scroll(_table(results, groups, role or _role), title),
        el("p", _units(results), class_="small muted"),
    ]


def _table(
    results: Results, groups: list[tuple[str, list[TableRow]]], role: Callable[[Model], str]
) -> Markup:
    head = [
        el("th", breakable(model.name), el("small", role(model)), scope="col")
        for model in results.models
    ]
    body = []
    for heading, rows in groups:
        span = len(results.models) + 1
        body.append(el("tr", el("th", heading, colspan=span, scope="rowgroup"), class_="group"))
        body += [_row(row) for row in rows]
    return el("table", el("thead", el("tr", el("td"), head)), el("tbody", body))


def _role(model: Model) -> str:
    if model.manifest is not None:
        return model.manifest.stage
    return "source" if model.role == "source" else "for comparison, not made of it"


def _row(row: TableRow) -> Markup:
    note = el("small", row.note) if row.note else None
    return el("tr", el("th", row.label, note, scope="row"), [_cell(cell) for cell in row.cells])


def _cell(cell: TableCell | None) -> Markup:
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
    sentences += sorted({note for run in results.runs for note in run.budget_notes})
    return " ".join(sentences)
