"""Puts measurements of several models side by side, and says what changed against the source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from shearling.evaluate.results import Evaluation, Spread
from shearling.report import numbers
from shearling.report.draw.table import Change, TableCell, TableRow
from shearling.report.numbers import exact
from shearling.report.records.records import TimedRun
from shearling.report.records.results import Model, Results

AXES = {
    "layers": "Blocks",
    "hidden": "Hidden size",
    "heads": "Query heads",
    "kv_heads": "Key/value heads",
    "linear_heads": "Heads of linear attention",
    "mlp": "MLP neurons",
    "experts": "Experts",
    "expert_mlp": "Neurons of an expert",
    "head_dim": "Head dimension",
    "vocab": "Vocabulary",
}
T = TypeVar("T")
Measured = tuple[str, str]  # what, and under which conditions
Load = tuple[int, int, int, str, str]  # batch, prompt, new tokens, machine, engine


def sizes_changed(source: Model, model: Model) -> dict[str, tuple[int, int]]:
    """Axis -> size in the source and in the model, for every axis of which they differ."""
    axes = dict.fromkeys((*AXES, *source.shape))
    return {
        axis: (source.shape[axis], model.shape[axis])
        for axis in axes
        if axis in source.shape and axis in model.shape and source.shape[axis] != model.shape[axis]
    }


def same_tokens(source: Model, model: Model) -> bool:
    """Whether two models may be compared token by token: a cut vocabulary spells texts anew."""
    sizes = (source.shape.get("vocab"), model.shape.get("vocab"))
    return None in sizes or sizes[0] == sizes[1]


def change(before: float, after: float, lower_is_better: bool | None) -> Change | None:
    """How a value changed, and whether that is for the better."""
    percent, ratio = numbers.percent(before, after), numbers.ratio(before, after)
    if percent is None or ratio is None:
        return None
    better = None if before == after or lower_is_better is None else (after < before)
    return Change(percent, ratio, better if better is None or lower_is_better else not better)


def speed_change(before: Spread, after: Spread) -> Change | None:
    """How a speed changed; where the ranges overlap, whether for the better is anyone's guess."""
    measured = change(before.median, after.median, lower_is_better=False)
    if measured and before.min <= after.max and after.min <= before.max:
        return Change(measured.percent, measured.ratio, None)
    return measured


def by_text(results: Results) -> dict[Measured, dict[str, Evaluation]]:
    """Evaluations that may be compared with each other: same text, same tokens, same windows."""
    table: dict[Measured, dict[str, Evaluation]] = {}
    for one in results.evaluations:
        windows = f"{exact(one.tokens)} tokens in windows of {exact(one.window)}"
        key = (one.text, windows + (", each after a BOS" if one.bos else ""))
        table.setdefault(key, {})[one.model.fingerprint] = one
    return table


def by_load(results: Results) -> dict[Load, dict[str, TimedRun]]:
    """Runs that may be compared: same batch, prompt and length, machine and engine."""
    table: dict[Load, dict[str, TimedRun]] = {}
    for one in results.runs:
        key = (one.batch, one.prompt, one.new, one.machine, one.engine)
        table.setdefault(key, {})[one.model.fingerprint] = one
    return dict(sorted(table.items()))


def groups(results: Results) -> list[tuple[str, list[TableRow]]]:
    """All rows of the table under their headings; a heading without rows is left out."""
    texts, loads = by_text(results), by_load(results)
    machines = {machine for *_, machine, _ in loads}
    engines = {engine for *_, engine in loads}

    def where(machine: str, engine: str) -> str:
        used = f", with {engine}" if len(engines) > 1 or engine != "transformers" else ""
        return used + (f", on {machine}" if len(machines) > 1 else "")

    speed: list[TableRow] = []
    peaks: list[TableRow] = []
    for name, of in (("Prefill", _prefill), ("Decode", _decode)):
        for (batch, prompt, new, *how), runs in loads.items():
            load = f"prompt of {exact(prompt)}" if name == "Prefill" else f"{exact(new)} new tokens"
            note = f"tokens/s, {load}{where(*how)}"
            speed.append(_row(results, f"{name}, batch {batch}", note, runs, _speed_cell(of)))
    for (batch, prompt, new, *how), runs in loads.items():
        note = f"prompt of {exact(prompt)}, {exact(new)} new{where(*how)}"
        row = _row(results, f"Peak memory, batch {batch}", note, runs, _memory_cell)
        peaks += [row] if any(row.cells) else []
    perplexity = [
        _row(results, text, note, evaluations, _perplexity_cell, same_tokens)
        for (text, note), evaluations in texts.items()
    ]
    headed = [
        ("Size", _size_rows(results)),
        ("Perplexity, lower is better", perplexity),
        ("Speed, higher is better", speed),
        ("Memory, lower is better", peaks),
    ]
    return [(heading, rows) for heading, rows in headed if rows]


def _size_rows(results: Results) -> list[TableRow]:
    models = results.models
    rows = []
    for axis, label in AXES.items():
        sizes = [model.shape.get(axis) for model in models]
        if axis == "layers" or len({size for size in sizes if size is not None}) > 1:
            rows.append(_plain(label, "", sizes, exact, None))
    rows.append(_plain("Parameters", "", [one.parameters for one in models], numbers.count, True))
    rows.append(_plain("On disk", "", [one.bytes for one in models], numbers.disk, True))
    return [row for row in rows if any(row.cells)]


def _plain(
    label: str,
    note: str,
    values: Sequence[int | None],
    write: Callable[[int], str],
    lower_is_better: bool | None,
) -> TableRow:
    """A row of exact numbers, the first of which is the source's; one that stayed says no more."""
    first = values[0]
    cells = [
        None
        if value is None
        else TableCell(
            write(value),
            change=change(first, value, lower_is_better) if first not in (None, value) else None,
        )
        for value in values
    ]
    return TableRow(label, note, tuple(cells))


def _row(
    results: Results,
    label: str,
    note: str,
    measured: dict[str, T],
    cell: Callable[[T, T | None], TableCell | None],
    comparable: Callable[[Model, Model], bool] = lambda source, model: True,
) -> TableRow:
    """A row of measurements, each compared with the source's where there is one."""
    source = results.source
    first = measured.get(source.fingerprint) if source else None

    def of(model: Model) -> TableCell | None:
        one = measured.get(model.fingerprint)
        if one is None:
            return None
        alike = source is not None and comparable(source, model)
        return cell(one, first if alike and one is not first else None)

    return TableRow(label, note, tuple(of(model) for model in results.models))


def _perplexity_cell(one: Evaluation, source: Evaluation | None) -> TableCell:
    changed = change(source.perplexity, one.perplexity, True) if source else None
    return TableCell(numbers.figure(one.perplexity), change=changed)


def _prefill(run: TimedRun) -> Spread:
    return run.prefill


def _decode(run: TimedRun) -> Spread:
    return run.decode


def _speed_cell(
    of: Callable[[TimedRun], Spread],
) -> Callable[[TimedRun, TimedRun | None], TableCell]:
    def cell(run: TimedRun, source: TimedRun | None) -> TableCell:
        speed = of(run)
        spread = f"{numbers.figure(speed.min)}–{numbers.figure(speed.max)}"
        changed = speed_change(of(source), speed) if source else None
        return TableCell(numbers.figure(speed.median), spread, changed)

    return cell


def _memory_cell(run: TimedRun, source: TimedRun | None) -> TableCell | None:
    if run.peak_memory is None:
        return None
    before = source.peak_memory if source else None
    changed = change(before, run.peak_memory, True) if before is not None else None
    return TableCell(numbers.memory(run.peak_memory, before), change=changed)
