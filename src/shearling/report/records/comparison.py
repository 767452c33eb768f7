"""A comparison record: many ways to do one thing, measured alike, as rows of a table.

The file says which of its rows' keys tell panels apart, which name a line within a panel, which
name the variants of a line, and which are measures; nothing here knows what was compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from shearling.files.results import public
from shearling.report.records.fields import Fields

Value = str | float
Where = tuple[Value, ...]  # a panel: the values of the keys that tell panels apart


@dataclass(frozen=True)
class Speed:
    """Tokens a second of what a panel's rows all have in common: their shape."""

    batch: int
    prefill: float | None
    decode: float | None


@dataclass(frozen=True)
class Entry:
    """One row: a variant (``series``) of a line (``label``), and what was measured of it."""

    label: str
    series: str
    values: dict[str, Value] = field(default_factory=dict)

    def number(self, key: str) -> float:
        """A measure, or NaN where there is none."""
        value = self.values.get(key)
        return value if isinstance(value, float) else math.nan


@dataclass(frozen=True)
class Panel:
    """Rows that compare with one another."""

    name: str
    entries: tuple[Entry, ...]
    speeds: tuple[Speed, ...] = ()

    def labels(self, measure: str) -> list[str]:
        """The lines, the one with the lowest measure in any variant first."""
        best: dict[str, float] = {}
        for entry in self.entries:
            value = entry.number(measure)
            here = best.setdefault(entry.label, math.inf)
            best[entry.label] = here if math.isnan(value) else min(value, here)
        return sorted(best, key=lambda label: best[label])


@dataclass(frozen=True)
class Comparison:
    """Everything one file says. ``measures`` are better when lower; keys map to headings."""

    title: str
    note: str
    measures: dict[str, str]
    columns: dict[str, str]
    series: tuple[str, ...]  # in the order of the variants, such as before and after repair
    baseline: Entry | None
    baseline_speeds: tuple[Speed, ...]
    panels: tuple[Panel, ...]
    created: str


def read_comparison(fields: Fields) -> Comparison:
    """Read a file of the kind ``comparison`` (docs/files.md).

    Raises:
        ShearlingError: a field is missing or is not what it should be.
    """
    keys = [_text(fields, "panel", key) for key in fields.items("panel")]
    baseline = public(fields.text("baseline")) if fields.has("baseline") else None
    measures = {public(key): str(name) for key, name in fields.mapping("measures").items()}
    if not measures:
        fields.refuse("measures", "at least one key of the rows with its heading")
    columns = {public(key): str(name) for key, name in fields.mapping("columns").items()}
    speeds = _speeds(fields, keys)
    intact: Entry | None = None
    panels: dict[Where, list[Entry]] = {}
    for row in fields.children("rows"):
        entry = _entry(fields, row, (*measures, *columns))
        if entry.label == baseline:
            intact = entry
        else:
            where = tuple(_value(row, key) for key in keys)
            panels.setdefault(where, []).append(entry)
    template = fields.text("panel_name") if fields.has("panel_name") else None
    return Comparison(
        title=public(fields.text("title")),
        note=fields.text("note") if fields.has("note") else "",
        measures=measures,
        columns=columns,
        series=_series(fields, [one for entries in panels.values() for one in entries]),
        baseline=intact,
        baseline_speeds=speeds.get((baseline or "",), ()),
        panels=tuple(
            Panel(
                _named(template, dict(zip(keys, where, strict=True))),
                tuple(panels[where]),
                speeds.get(where, ()),
            )
            for where in sorted(panels, key=lambda one: [_sortable(value) for value in one])
        ),
        created=str(fields.raw("created") or ""),
    )


def _entry(fields: Fields, row: Fields, wanted: tuple[str, ...]) -> Entry:
    """One row with the values that are shown; a null or absent one is left out."""
    series = row.label(fields.text("series")) if fields.has("series") else ""
    values = {key: _value(row, key) for key in wanted if row.has(key)}
    return Entry(row.label(fields.text("label")), series, values)


def _value(row: Fields, key: str) -> Value:
    value = row.raw(key)
    return public(value) if isinstance(value, str) else row.number(key)


def _text(fields: Fields, key: str, value: Any) -> str:
    return value if isinstance(value, str) else fields.refuse(key, "a list of keys of the rows")


def _series(fields: Fields, entries: list[Entry]) -> tuple[str, ...]:
    """Variants in the order the file gives, and then in which they appear."""
    order = [public(str(one)) for one in fields.items("order")] if fields.has("order") else []
    found = dict.fromkeys(entry.series for entry in entries)
    return tuple(one for one in dict.fromkeys((*order, *found)) if one in found)


def _speeds(fields: Fields, keys: list[str]) -> dict[Where, tuple[Speed, ...]]:
    """Speeds by batch size of a panel, or of the baseline, which is named like its row."""
    found: dict[Where, list[Speed]] = {}
    for one in fields.children("speed") if fields.has("speed") else ():
        label = fields.text("label")
        names = [label] if one.has(label) else keys
        where = tuple(_value(one, key) for key in names)
        speed = Speed(one.integer("batch"), _median(one, "prefill"), _median(one, "decode"))
        found.setdefault(where, []).append(speed)
    return {where: tuple(sorted(of, key=lambda one: one.batch)) for where, of in found.items()}


def _median(fields: Fields, what: str) -> float | None:
    """A speed as ``bench`` writes it, with its spread, or as a number."""
    key = f"{what}_tokens_per_s"
    if isinstance(fields.raw(key), dict):
        return fields.child(key).number("median")
    return fields.maybe_number(key)


def _named(template: str | None, where: dict[str, Value]) -> str:
    """ "{axis}, −{removed} %" with the values of a panel; or the values themselves."""
    if template is None:
        return ", ".join(map(_written, where.values()))
    for key, value in where.items():
        template = template.replace("{" + key + "}", _written(value))
    return template


def _written(value: Value) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _sortable(value: Value) -> tuple[bool, float, str]:
    text = isinstance(value, str)
    return (text, 0.0 if isinstance(value, str) else value, str(value) if text else "")
