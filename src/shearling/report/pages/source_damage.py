"""What a cut lost on each of its calibration sources, as a small table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shearling.report.draw.markup import Markup, el
from shearling.report.draw.sections import breakable, scroll
from shearling.report.numbers import exact, figure
from shearling.report.records.fields import as_number
from shearling.report.records.records import Manifest

FIGURES = ("perplexity_before", "perplexity_after", "divergence")


def source_damage(step: Manifest) -> Markup | None:
    """A row for each source, worst first; nothing where there was one alone, or no repair."""
    repair = step.options.get("repair")
    damages = repair.get("sources") if isinstance(repair, dict) else None
    rows = [_read(one) for one in damages] if isinstance(damages, list) else []
    known = sorted((row for row in rows if row is not None), key=lambda row: -row[2][2])
    if not known:
        return None
    heads = ("source", "perplexity before", "after", "times", "nats from the source model")
    table = el(
        "table",
        el("thead", el("tr", [el("th", head, scope="col") for head in heads])),
        el("tbody", [_row(*row) for row in known]),
    )
    return scroll(table, "Held-out damage on each calibration source")


def _read(one: Any) -> tuple[str, int | None, tuple[float, ...]] | None:
    """Name, tokens and figures of an entry; None unless it has a name and all figures."""
    if not isinstance(one, dict) or not isinstance(one.get("name"), str):
        return None
    before, after, divergence = (as_number(one.get(key)) for key in FIGURES)
    if not before or after is None or divergence is None:
        return None
    tokens = one.get("tokens")
    figures = (before, after, after / before, divergence)
    return one["name"], tokens if isinstance(tokens, int) else None, figures


def _row(name: str, tokens: int | None, figures: Sequence[float]) -> Markup:
    note = None if tokens is None else el("small", f"{exact(tokens)} tokens")
    label = el("th", breakable(name), note, scope="row")
    return el("tr", label, [el("td", figure(value)) for value in figures])
