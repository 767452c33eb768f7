"""The table of tasks: accuracies with their intervals, and what differs from the source's."""

from __future__ import annotations

from shearling.report.decide.accuracy import (
    MeanAccuracy,
    beyond_noise,
    by_task,
    is_accuracy,
    means,
    shared_tasks,
)
from shearling.report.draw.markup import Markup, el
from shearling.report.draw.sections import breakable, scroll, section
from shearling.report.numbers import MINUS, THIN, exact, figure, plural
from shearling.report.records.quality import Asked, TaskFigure
from shearling.report.records.results import Results


def tasks_section(results: Results) -> Markup | None:
    """A row a task and a column a model; nothing where no task was asked."""
    table = {asked: row for asked, row in by_task(results).items() if _shown(results, row)}
    if not table:
        return None
    source = results.source
    first = source.fingerprint if source else None
    average, shared = means(results), len(shared_tasks(results))
    rows = [_row(results, first, asked, row) for asked, row in table.items()]
    if shared > 1:
        before = average.get(first or "")
        cells = [
            _accuracy(average.get(model.fingerprint), before, model.fingerprint == first)
            for model in results.models
        ]
        label = el("th", el("b", "Mean"), el("small", f"of {shared} tasks"), scope="row")
        rows.append(el("tr", label, cells, class_="total"))
    heads = [el("th", breakable(model.name), scope="col") for model in results.models]
    whole = el("table", el("thead", el("tr", el("td"), heads)), el("tbody", rows))
    return section(
        "Tasks", scroll(whole, "Tasks"), el("p", _note(results, table), class_="small muted")
    )


def accuracy(value: float) -> str:
    """A share in per cent, without the sign: 0.6134 -> "61.3"."""
    return f"{100 * value:.1f}".replace("-", MINUS)


def points(before: float, after: float) -> str:
    """A difference of two shares: "−2.1 points"."""
    change = 100 * (after - before)
    if abs(change) < 0.05:
        return "±0 points"
    return f"{'+' if change > 0 else MINUS}{abs(change):.1f} points"


def _shown(results: Results, row: dict[str, TaskFigure]) -> bool:
    return any(model.fingerprint in row for model in results.models)


def _row(results: Results, first: str | None, asked: Asked, row: dict[str, TaskFigure]) -> Markup:
    name, metric, shots, limit, samples, engine = asked
    notes = [metric] + ([f"{exact(shots)}-shot"] if shots is not None else [])
    if samples is not None:
        notes.append(plural(samples, "question"))
    elif limit is not None:
        notes.append(f"the first {plural(limit, 'question')}")
    if engine != "transformers":
        notes.append(f"with {engine}")
    label = el("th", breakable(name), el("small", ", ".join(notes)), scope="row")
    before = row.get(first or "")
    cell = _accuracy if is_accuracy(metric) else _lower
    cells = [
        cell(row.get(model.fingerprint), before, model.fingerprint == first)
        for model in results.models
    ]
    return el("tr", label, cells)


def _accuracy(
    one: TaskFigure | MeanAccuracy | None, before: TaskFigure | MeanAccuracy | None, is_first: bool
) -> Markup:
    if one is None:
        return el("td", el("span", "–", class_="muted", title="not measured"))
    # 1.96 standard errors, in per cent
    around = "" if one.stderr is None else f" ± {196 * one.stderr:.1f}"
    lines: list[object] = [accuracy(one.value), el("span", around, class_="muted")]
    if before is not None and not is_first:
        differs = beyond_noise(before, one)
        kind = ("better" if one.value > before.value else "worse") if differs else None
        said = points(before.value, one.value)
        lines.append(el("small", el("b", said) if differs else said, class_=kind))
    return el("td", lines)


def _lower(one: TaskFigure | MeanAccuracy | None, before: object, is_first: bool) -> Markup:
    """A perplexity among the tasks: what a difference of it means, no error says."""
    if one is None:
        return _accuracy(None, None, is_first)
    around = "" if one.stderr is None else f" ± {figure(1.96 * one.stderr)}"
    return el("td", figure(one.value), el("span", around, class_="muted"))


def _note(results: Results, table: dict[Asked, dict[str, TaskFigure]]) -> str:
    sentences = [f"Accuracies in per cent with their 95{THIN}% intervals (± 1.96 standard errors)."]
    if results.source and len(results.models) > 1:
        sentences.append(
            f"Second lines are differences from {results.source.name}; those in bold exceed "
            "noise, all others may be chance."
        )
    tasks = [one for row in table.values() for one in row.values()]
    if any(one.stderr is None for one in tasks):
        sentences.append("Where no ± stands, no standard error was recorded.")
    if any(one.limit is not None for one in tasks):
        sentences.append(
            "Tasks were cut short: their intervals are wide, and a full run may differ."
        )
    return " ".join(sentences)
