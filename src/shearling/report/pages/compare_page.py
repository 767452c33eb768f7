"""The page of ``shearling compare``: which of these models to ship."""

from __future__ import annotations

from importlib import resources

from shearling.report import numbers
from shearling.report.decide.accuracy import means
from shearling.report.decide.candidates import Field, Measure
from shearling.report.decide.choice import Decision
from shearling.report.decide.compare import groups
from shearling.report.decide.selection import ComparisonResults
from shearling.report.draw.markup import Markup, el, join
from shearling.report.draw.sections import absent, breakable, scroll, section
from shearling.report.draw.table import figures_table
from shearling.report.draw.vector import drawing
from shearling.report.numbers import THIN, figure, memory
from shearling.report.pages.abilities import abilities_section
from shearling.report.pages.anatomy import anatomy
from shearling.report.pages.behaviour import degeneration_section, judgements_section
from shearling.report.pages.charts import damage_figures, damage_intro, glyph
from shearling.report.pages.healing import healing_section
from shearling.report.pages.lineage import lineage_section
from shearling.report.pages.loading_hints import loading_section
from shearling.report.pages.page import document, footer
from shearling.report.pages.pareto import pareto_plot, points_of
from shearling.report.pages.samples import samples_section
from shearling.report.pages.task_table import accuracy, tasks_section
from shearling.report.pages.verdict import comparison_title, cost, verdict_header
from shearling.report.records.results import Model, Results

DRAWN = 2  # measures of quality that are drawn at once; the others are folded away
TEXTS = 3  # perplexities in the first table; all of them are in the full one


def compare_page(selection: ComparisonResults, choice: Decision) -> str:
    """The whole page, with what was decided among the models of the selection's table."""
    results = selection.table
    sections = [
        _tradeoffs(choice),
        _overview(results, choice),
        abilities_section(results),
        tasks_section(results),
        _figures(results),
        degeneration_section(results),
        judgements_section(results),
        *_cuts(selection),
        healing_section(selection.everyone),
        samples_section(results),
        _lineage(selection),
        loading_section(selection),
    ]
    rules = resources.files("shearling.report.pages").joinpath("compare.css").read_text("utf-8")
    return document(
        comparison_title(choice),
        verdict_header(results, choice),
        el("main", sections),
        footer(results),
        style=rules,
    )


def _tradeoffs(choice: Decision) -> Markup:
    """Quality against size and against speed."""
    title, field = "Trade-offs", choice.field
    drawn = [
        row
        for place, measure in enumerate(field.quality)
        if (row := _row(choice, measure, place)) is not None
    ]
    if not drawn:
        return absent(title, "Not drawn: fewer than two models have a figure of quality in common.")
    square = '<path d="M2 2h8v8h-8z"/>'
    key = [
        el("li", glyph(square, "ink", 12), "baseline"),
        el("li", glyph('<circle cx="6" cy="6" r="4"/>', "ink", 12), "on the front"),
        el("li", el("i", class_="beaten"), "beaten in this drawing"),
    ]
    if choice.pick:
        key.append(el("li", el("i", class_="picked"), "the pick"))
    intro = (
        "Every model is a point, and higher is better, also where that turns an axis. On the line "
        f"lie those that no other beats; a size within 1{THIN}% and a speed within the spread of "
        f"its runs count as equal. Bars are 95{THIN}% intervals of accuracies, and the slowest and "
        "fastest run."
    )
    folded = drawn[DRAWN:]
    more = el("details", el("summary", "Other texts"), folded) if folded else None
    return section(title, el("p", intro), el("ul", key, class_="key"), drawn[:DRAWN], more)


def _row(choice: Decision, quality: Measure, place: int) -> Markup | None:
    """The drawings of one measure of quality, side by side."""
    field = choice.field
    figures = []
    for across in (field.size, field.speed):
        points = points_of(field.models, across, quality, choice.pick) if across else []
        if across is None or len(points) < 2:
            continue
        name = quality.name[0].upper() + quality.name[1:]
        label = f"{name} against {across.name} of {len(points)} models"
        draw = pareto_plot(points, across, quality)
        figures.append(
            el(
                "figure",
                drawing(draw, f"front-{place}-{across.kind}", label, height=330,
                        narrow_height=290, width=440),
            )
        )  # fmt: skip
    if not figures:
        return None
    unit = ", per cent" if quality.kind == "accuracy" else ""
    title = f"{quality.name[0].upper()}{quality.name[1:]}{unit}"
    note = el("span", f", {quality.note}", class_="muted") if quality.note else None
    grid = el("div", figures, class_="small-multiples", style="--columns:2")
    return el("div", el("h3", title, note), grid, class_="front")


def _overview(results: Results, choice: Decision) -> Markup:
    """A row a model: what one wants to know first, and what was decided."""
    field = choice.field
    quality = _shown(choice)
    heads = ["", "Parameters", "On disk", "Bits a parameter"]
    heads += [f"{one.name[0].upper()}{one.name[1:]}" for one in quality]
    heads += ["Decode, tokens/s"] if field.speed else []
    heads += ["Peak memory"] if (peaks := _peaks(results, field)) else []
    rows = []
    for model in field.models:
        name = el("th", breakable(model.name), el("small", _verdict(choice, model)), scope="row")
        cells = [
            model.parameters and numbers.count(model.parameters),
            model.bytes and numbers.disk(model.bytes),
            _bits(model),
            *(_quality_cell(results, one, model) for one in quality),
        ]
        if field.speed:
            speed = field.speed.of(model)
            cells.append(speed and figure(speed.value))
        if peaks:
            cells.append(peaks.get(model.fingerprint))
        rows.append(
            el("tr", name, [el("td", cell or el("span", "–", class_="muted")) for cell in cells],
               class_="dominated" if model.fingerprint in choice.dominated else None)
        )  # fmt: skip
    head = el("thead", el("tr", [el("th", one, scope="col") for one in heads]))
    table = el("table", head, el("tbody", rows), class_="overview")
    note = "Bits a parameter: bytes on disk times eight, over parameters."
    if field.speed:
        note += f" Speed: {field.speed.note}."
    title = "At a glance"
    return section(title, scroll(table, title), el("p", note, class_="small muted"))


def _shown(choice: Decision) -> list[Measure]:
    """Accuracy, abilities, some perplexities: first what decided, then what several models have."""
    known = [one for one in choice.field.quality if one not in choice.deciding]
    several = [one for one in known if len(one.values) > 1]
    measures = [*choice.deciding, *several] or known
    first = [one for one in measures if one.kind in ("accuracy", "abilities")]
    return first + [one for one in measures if one.kind == "perplexity"][:TEXTS]


def _quality_cell(results: Results, measure: Measure, model: Model) -> object:
    value = measure.of(model)
    if value is None:
        return None
    if measure.kind != "accuracy":
        return figure(value.value)
    margin = means(results)[model.fingerprint].margin
    around = f" ± {100 * margin:.1f}" if margin is not None else ""
    return [accuracy(value.value), el("span", around, class_="muted")]


def _bits(model: Model) -> str | None:
    if not model.parameters or model.bytes is None:
        return None
    return f"{8 * model.bytes / model.parameters:.1f}"


def _peaks(results: Results, field: Field) -> dict[str, str]:
    """Peak memory by fingerprint, at the load the speeds are of."""
    if field.speed is None:
        return {}
    peaks = {}
    for run in results.runs:
        speed = field.speed.values.get(run.model.fingerprint)
        same = speed is not None and speed.value == run.decode.median
        if same and run.peak_memory is not None:
            peaks[run.model.fingerprint] = memory(run.peak_memory)
    return peaks


def _verdict(choice: Decision, model: Model) -> Markup:
    """What was found about one model, in a few words."""
    field = choice.field
    words: list[object] = []
    if model is field.baseline:
        words.append("baseline")
    if model in choice.broken:
        words.append(el("span", "proof of surgery failed", class_="failed"))
    if model is choice.pick:
        words.append(el("b", "the pick"))
    if model is choice.quickest:
        words.append(el("b", "the fastest that is good enough"))
    elif model is choice.fastest:
        words.append("fastest")
    if model.fingerprint in choice.dominated:
        words.append(f"beaten by {choice.dominated[model.fingerprint].name}")
    if choice.deciding and model in choice.unmeasured:
        words.append("not measured alike")
    elif (loss := choice.loss(model)) is not None and model is not field.baseline:
        kept = f"within {100 * choice.within:g}{THIN}%"
        words.append(kept if loss <= choice.within else cost(choice, model))
    if model.manifest is not None and model.manifest.stage == "quantize":
        kind = model.manifest.options.get("to") or model.manifest.options.get("scheme")
        words.append(f"quantised{f' to {kind}' if isinstance(kind, str) else ''}")
    return join(", ", words)


def _figures(results: Results) -> Markup | None:
    """Everything that was measured, as in a report."""
    headed = groups(results)
    title = "All figures"
    baseline = results.models[0]

    def role(model: Model) -> str:
        stage = model.manifest.stage if model.manifest else ""
        return ", ".join(one for one in ("baseline" * (model is baseline), stage) if one)

    return section(title, figures_table(results, headed, title, role))


def _cuts(selection: ComparisonResults) -> list[Markup | None]:
    """What is left of each source, and what the removal of its blocks costs."""
    several = len(selection.families) > 1
    drawn, damage = [], []
    for place, family in enumerate(selection.families):
        name = [el("h3", f"Of {family.models[0].name}", class_="family")] if several else []
        if (picture := anatomy(family)) is not None:
            drawn.append([*name, picture])
        if curves := damage_figures(family, f"damage-{place}", named=True):
            damage.append([*name, curves])
    return [
        section("What was cut", drawn) if drawn else None,
        section("Damage", damage_intro(), damage) if damage else None,
    ]


def _lineage(selection: ComparisonResults) -> Markup | None:
    made = tuple(model for family in selection.families for model in family.made)
    if not made:
        return None
    return lineage_section(Results(made, (), (), (), (), ()))
