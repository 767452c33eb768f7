"""The section on several sizes of one model that were made together."""

from __future__ import annotations

from shearling.pruning.results import FamilyFile, FamilySize
from shearling.report.decide.compare import AXES
from shearling.report.draw.markup import Markup, el
from shearling.report.draw.sections import breakable, scroll, section
from shearling.report.numbers import THIN, disk, exact, figure, percent, ranges
from shearling.report.records.results import Results

HEADS = ("Parameters", "On disk", "Shape", "Blocks removed", "Error", "Divergence", "Proof")


def family_section(results: Results) -> Markup | None:
    """A table for every family; nothing where none was made."""
    if not results.families:
        return None
    intro = (
        "Sizes of one model that were made together: scored once, and each repaired beside the "
        "same walk of the source. Error: what was missing of the stream’s squared norm on held-out "
        "calibration text, mean over the matrices solved, with the repair and, small, without. "
        "Divergence: of the next-token distribution from the source’s on such text, in nats. "
        "Proof: largest difference of a logit from the source with the removed units masked."
    )
    return section("Sizes", el("p", intro), [_table(family) for family in results.families])


def _table(family: FamilyFile) -> Markup:
    heads = [el("th", head, scope="col") for head in HEADS]
    rows = [_row(size, family) for size in family.sizes]
    table = el("table", el("thead", el("tr", el("td"), heads)), el("tbody", rows))
    nested = (
        "Each keeps only blocks and units that the next larger one keeps."
        if family.nested
        else "What each keeps was chosen for its own size."
    )
    note = f"Of {family.source.name}. {nested}"
    return el("figure", scroll(table, "Sizes"), el("p", note, class_="small muted"))


def _row(size: FamilySize, family: FamilyFile) -> Markup:
    before = family.source
    label = el("th", breakable(size.name), scope="row")
    change = None if before.parameters is None else percent(before.parameters, size.parameters)
    changed = [
        f"{AXES.get(axis, axis)} {exact(now)}"
        for axis, now in size.shape.items()
        if now != before.shape.get(axis, now)
    ]
    return el(
        "tr", label,
        el("td", exact(size.parameters), el("small", change) if change else None),
        el("td", disk(size.bytes)),
        el("td", ", ".join(changed)),
        el("td", ranges(size.removed) if size.removed else "none"),
        el("td", _share(size.error_after), _small(size.error_before)),
        el("td", "–" if size.divergence is None else figure(size.divergence)),
        el("td", "–" if size.proof is None else figure(size.proof)),
    )  # fmt: skip


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}{THIN}%"


def _small(value: float | None) -> Markup | None:
    return None if value is None else el("small", f"{_share(value)} without")
