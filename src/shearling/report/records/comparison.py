"""A comparison record: many ways to do one thing, measured alike, as rows of a table.

The file says which of its rows' keys tell panels apart, which name a line within a panel, which
name the variants of a line, and which are measures; nothing here knows what was compared.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field
from typing import Annotated, Any, ClassVar

from shearling.files.results import Misfit, ResultFile, entry, public
from shearling.report.records.fields import as_number, name_of

Value = str | float
Where = tuple[Value, ...]  # a panel: the values of the keys that tell panels apart
Keys = Annotated[tuple[str, ...], "a list of keys of the rows"]
HEADED = "at least one key of the rows with its heading"
Headings = Annotated[dict[str, str], HEADED]
Row = dict[str, Any]
STAGES = ("prefill", "decode")


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
        for row in self.entries:
            value = row.number(measure)
            here = best.setdefault(row.label, math.inf)
            best[row.label] = here if math.isnan(value) else min(value, here)
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


@dataclass(frozen=True)
class ComparisonFile(ResultFile):
    """Many ways to do one thing, measured alike, as a table that says how it is to be read."""

    kind: ClassVar[str] = "comparison"
    written_by: ClassVar[str] = "anybody; `benchmarks/one_shot.py`"

    title: str = entry()
    note: str = entry(absent="")
    panel: Keys = entry(
        "the keys whose values put rows into one panel; panels come sorted by them in this order"
    )
    panel_name: str | None = entry('of a panel, such as `"{axis}, −{removed} %"`', absent=None)
    label: str = entry("the key that names a line")
    series: str | None = entry("the key that names a line's variants", absent=None)
    order: tuple[str, ...] = entry("of the variants", absent=())
    baseline: str | None = entry(
        "the label of the row that all others are measured against; it belongs to no panel",
        absent=None,
    )
    measures: Headings = entry(
        "key of the rows -> heading; lower is better, the first is drawn and orders the lines"
    )
    columns: dict[str, str] = entry("the same of what the table alone shows", absent={})
    rows: tuple[Row, ...] = entry("a value that was not measured is null or absent")
    speed: tuple[Row, ...] = entry(
        "tokens a second (`batch`, `prefill_tokens_per_s`, `decode_tokens_per_s`: a number, or "
        "`median`, `min` and `max`) of all rows of a panel, or of the baseline",
        absent=(),
    )

    def __post_init__(self) -> None:
        """Refuse rows without what the rest of the file says they have."""
        if not self.measures:
            raise Misfit("measures", HEADED, {})
        for index, row in enumerate(self.rows):
            self._check_row(row, f"rows[{index}]")
        for index, row in enumerate(self.speed):
            place = [self.label] if row.get(self.label) is not None else self.panel
            for key in place:
                _check_value(row, key, f"speed[{index}]")
            batch = row.get("batch", MISSING)
            if type(batch) is not int or batch < 0:
                raise Misfit(f"speed[{index}].batch", "a whole number", batch)
            for stage in STAGES:
                _check_speed(row, f"{stage}_tokens_per_s", f"speed[{index}]")

    def _check_row(self, row: Row, where: str) -> None:
        for key in (self.label, *([] if self.series is None else [self.series])):
            if not name_of(row.get(key)):
                raise Misfit(f"{where}.{key}", "a name", row.get(key, MISSING))
        for key in (*self.measures, *self.columns):
            if row.get(key) is not None:
                _check_value(row, key, where)
        if name_of(row.get(self.label)) != self.intact:
            for key in self.panel:
                _check_value(row, key, where)

    @property
    def intact(self) -> str | None:
        """What the baseline's row is called."""
        return None if self.baseline is None else public(self.baseline)


def _check_value(row: Row, key: str, where: str) -> None:
    """Raise Misfit unless a row has a text or a number there."""
    value = row.get(key, MISSING)
    if isinstance(value, str) or as_number(value) is not None:
        return
    raise Misfit(f"{where}.{key}", "a number", value)


def _check_speed(row: Row, key: str, where: str) -> None:
    """Raise Misfit unless a speed is as ``bench`` writes it, with its spread, or a number."""
    value = row.get(key)
    if isinstance(value, dict):
        value, where, key = value.get("median", MISSING), f"{where}.{key}", "median"
    if value is not None and as_number(value) is None:
        raise Misfit(f"{where}.{key}", "a number", value)


def comparison_of(file: ComparisonFile) -> Comparison:
    """A comparison as the report shows it: rows in their panels, sorted."""
    speeds = _speeds(file)
    intact: Entry | None = None
    panels: dict[Where, list[Entry]] = {}
    for row in file.rows:
        entry_ = _entry(file, row)
        if entry_.label == file.intact:
            intact = entry_
        else:
            where = tuple(_value(row, key) for key in file.panel)
            panels.setdefault(where, []).append(entry_)
    return Comparison(
        title=public(file.title),
        note=file.note,
        measures={public(key): name for key, name in file.measures.items()},
        columns={public(key): name for key, name in file.columns.items()},
        series=_series(file, [one for entries in panels.values() for one in entries]),
        baseline=intact,
        baseline_speeds=speeds.get((file.intact or "",), ()),
        panels=tuple(
            Panel(
                _named(file.panel_name, dict(zip(file.panel, where, strict=True))),
                tuple(panels[where]),
                speeds.get(where, ()),
            )
            for where in sorted(panels, key=lambda one: [_sortable(value) for value in one])
        ),
        created=file.created,
    )


def _entry(file: ComparisonFile, row: Row) -> Entry:
    """One row with the values that are shown; a null or absent one is left out."""
    series = "" if file.series is None else name_of(row[file.series])
    wanted = (*file.measures, *file.columns)
    values = {public(key): _value(row, key) for key in wanted if row.get(key) is not None}
    return Entry(name_of(row[file.label]), series, values)


def _value(row: Row, key: str) -> Value:
    value = row[key]
    return public(value) if isinstance(value, str) else float(value)


def _series(file: ComparisonFile, entries: list[Entry]) -> tuple[str, ...]:
    """Variants in the order the file gives, and then in which they appear."""
    shown = dict.fromkeys(entry_.series for entry_ in entries)
    order = [public(one) for one in file.order]
    return tuple(one for one in dict.fromkeys((*order, *shown)) if one in shown)


def _speeds(file: ComparisonFile) -> dict[Where, tuple[Speed, ...]]:
    """Speeds by batch size of a panel, or of the baseline, which is named like its row."""
    speeds: dict[Where, list[Speed]] = {}
    for row in file.speed:
        keys = [file.label] if row.get(file.label) is not None else file.panel
        where = tuple(_value(row, key) for key in keys)
        prefill, decode = (_median(row.get(f"{stage}_tokens_per_s")) for stage in STAGES)
        speeds.setdefault(where, []).append(Speed(row["batch"], prefill, decode))
    return {where: tuple(sorted(of, key=lambda one: one.batch)) for where, of in speeds.items()}


def _median(speed: Any) -> float | None:
    if isinstance(speed, dict):
        speed = speed["median"]
    return None if speed is None else float(speed)


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
