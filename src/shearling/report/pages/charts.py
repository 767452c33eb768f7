"""The sections with drawings: scores per block, and the damage as blocks go."""

from __future__ import annotations

import math
from collections.abc import Sequence

from shearling.evaluate.results import Curve, Damage
from shearling.report.draw.markup import Markup, el
from shearling.report.draw.plots import (
    Scale,
    damage_plot,
    is_shown,
    marker_of,
    scale_of,
    scores_plot,
)
from shearling.report.draw.sections import absent, scroll, section
from shearling.report.draw.vector import SERIES, drawing
from shearling.report.numbers import exact, figure, plural, ranges
from shearling.report.pages.anatomy import criterion_used
from shearling.report.records.fields import describe
from shearling.report.records.records import BlockScores
from shearling.report.records.results import Model, Results
from shearling.scoring.registry import Kind, meaning

SHAPES = {  # the markers of the plot, drawn by hand for its key
    "o": '<circle cx="15" cy="6" r="3.6"/>',
    "s": '<path d="M11.8 2.8h6.4v6.4h-6.4z"/>',
    "^": '<path d="M15 2l4 7h-8z"/>',
    "D": '<path d="M15 1.8l4.2 4.2-4.2 4.2-4.2-4.2z"/>',
    "v": '<path d="M15 10l4-7h-8z"/>',
    "P": '<path d="M13.5 2h3v2.5h2.5v3h-2.5V10h-3V7.500h-2.500v-3h2.500z"/>',
}


def scores_section(results: Results) -> Markup:
    """A bar chart a criterion, and the numbers behind them."""
    title = "Scores"
    scored = [one for one in results.scores if one.scores]
    if not scored:
        return absent(title, "No scores yet: `shearling score MODEL` writes them.")
    wanted = criterion_used(results)
    scored.sort(key=lambda one: one.criterion != wanted)  # a stable sort: the one used comes first
    intro = el("p", "The higher a block’s bar, the more its removal hurts; the lowest goes first.")
    figures = [_scores_figure(results, one, place) for place, one in enumerate(scored)]
    return section(title, intro, figures, _score_numbers(results, scored))


def _scores_figure(results: Results, one: BlockScores, place: int) -> Markup:
    gone = _gone(results, one)
    # only scores that are perplexities themselves have a baseline; perplexity is the exponential
    # of what is measured, so a logarithm is its natural scale
    scale = scale_of(one.scores, one.baseline, log_from=30 if one.baseline is None else 3)
    draw = scores_plot(one.scores, gone, one.protected, one.baseline, scale)
    label = f"Bar chart of {one.criterion} by {one.axis}; removed: {ranges(gone)}"
    return el(
        "figure",
        el("figcaption", _scores_caption(results, one, scale)),
        _scores_key(gone, one.protected, one.baseline),
        drawing(draw, f"scores-{place}", label),
    )


def _scores_caption(results: Results, one: BlockScores, scale: Scale) -> list[Markup]:
    parts = [in_words(one.criterion, "blocks")]
    if one.axis != "layers":
        parts.append(f"by index of {one.axis}")
    if scale.log:
        parts.append("logarithmic scale")
    elif scale.low > 0:
        parts.append("on an axis that does not start at zero")
    if len({score.model.fingerprint for score in results.scores}) > 1:
        parts.append(f"of {results.name_of(one.model.fingerprint)}")
    sentence = ", ".join(parts) + "."
    if one.calibration is not None:
        sentence += f" Calibration: {describe(one.calibration)}."
    for index in scale.off:
        sentence += f" Block {index} runs off the scale, at {figure(one.scores[index])}."
    unknown = [index for index, value in enumerate(one.scores) if math.isnan(value)]
    if unknown:
        sentence += f" Not a number: {ranges(unknown)}."
    return [el("h3", one.criterion), el("p", sentence, class_="small muted")]


def in_words(criterion: str, of: Kind) -> str:
    """What a criterion's scores are, as its registration says; one we do not know gives scores."""
    return (meaning(criterion, of) or "Score").replace("'", "’").replace("`", "")


def _scores_key(gone: Sequence[int], protected: frozenset[int], baseline: float | None) -> Markup:
    items = [el("li", _swatch("bar"), "kept" if gone else "score")]
    if gone:
        items.append(el("li", _swatch("accent"), "removed"))
    if protected:
        items.append(el("li", glyph('<path d="M6 1l5 9H1z"/>', "ink", 12), "protected"))
    if baseline is not None:
        line = '<path d="M0 6H30" stroke-width="1.500" stroke-dasharray="6 3.500"/>'
        items.append(el("li", glyph(line, "ink"), f"intact model, {figure(baseline)}"))
    return el("ul", items, class_="key")


def _swatch(variable: str) -> Markup:
    return glyph('<path d="M0 0h12v12H0z"/>', variable, 12)


def glyph(shape: str, variable: str, width: int = 30) -> Markup:
    """A small drawing of ours beside a word of a key."""
    style = f"fill:var(--{variable});stroke:var(--{variable});stroke-width:0"
    box = f"0 0 {width} 12"
    return el("svg", Markup(shape), viewBox=box, style=style, aria_hidden="true")


def _gone(results: Results, one: BlockScores) -> list[int]:
    """Indices of these scores that the primary model lacks."""
    primary = results.primary
    kept = primary.kept(one.axis, one.model.fingerprint) if primary else None
    return [] if kept is None else sorted(set(range(len(one.scores))) - set(kept))


def _score_numbers(results: Results, scored: list[BlockScores]) -> Markup:
    """The bars as a table, folded away."""
    first = scored[0]
    same = [
        one
        for one in scored
        if (one.model.fingerprint, one.axis) == (first.model.fingerprint, first.axis)
    ]
    gone = set(_gone(results, first))
    names = ["block", *(one.criterion for one in same)]
    head = el("tr", [el("th", name, scope="col") for name in names])
    rows = [
        el(
            "tr",
            el("th", index, " removed" if index in gone else None, scope="row"),
            [el("td", figure(o.scores[index]) if index < len(o.scores) else "–") for o in same],
            class_="gone-row" if index in gone else None,
        )
        for index in range(len(first.scores))
    ]
    table = el("table", el("thead", head), el("tbody", rows), class_="plain")
    return el("details", el("summary", "The numbers"), scroll(table, "Scores by block"))


def damage_section(results: Results) -> Markup:
    """Perplexity against blocks removed, a line for each criterion's order."""
    title = "Damage"
    figures = damage_figures(results)
    if not figures:
        return absent(title, "No damage curve yet: `shearling demo` measures one.")
    return section(title, damage_intro(), figures)


def damage_intro() -> Markup:
    """What the curves show."""
    return el(
        "p",
        "How perplexity grows as blocks are removed one after another in the order that each "
        "criterion proposes, before any repair.",
    )


def damage_figures(
    results: Results, prefix: str = "damage", *, named: bool = False
) -> list[Markup]:
    """A drawing a text, ``prefix`` making its identifiers unique.

    Args:
        named: mark every model made, by its name, rather than only the one the report is about.
    """
    damages = [one for one in results.damages if one.curves]
    return [
        _damage_figure(results, f"{prefix}-{place}", one, _marks(results, one, named))
        for place, one in enumerate(damages)
    ]


def _marks(results: Results, damage: Damage, named: bool) -> dict[int, list[str]]:
    """Blocks removed -> the models that lack so many of what the curves were measured on."""
    models = results.made if named else results.made[-1:]
    marks: dict[int, list[str]] = {}
    for model in models:
        if removed := _removed_count(model, damage):
            marks.setdefault(removed, []).append(model.name if named else "this model")
    return dict(sorted(marks.items()))


def _damage_figure(
    results: Results, prefix: str, damage: Damage, marks: dict[int, list[str]]
) -> Markup:
    wanted = criterion_used(results)
    curves = sorted(damage.curves, key=lambda one: one.criterion != wanted)
    values = [value for curve in curves for value in curve.perplexity if is_shown(value)]
    low, high = min(values, default=1.0), max(values, default=2.0)
    log = low > 0 and high / low > 4
    pad = (high / low) ** 0.06 if log else 0.08 * (high - low) or 1.0
    scale = Scale(low / pad, high * pad, True) if log else Scale(low - pad, high + pad, False)
    draw = damage_plot(curves, tuple(marks), scale)
    label = f"Perplexity on {damage.text} against blocks removed, {plural(len(curves), 'curve')}"
    return el(
        "figure",
        el("figcaption", _damage_caption(results, damage, log)),
        _damage_key(curves, marks),
        drawing(draw, prefix, label, height=320),
        _damage_numbers(curves),
    )


def _removed_count(model: Model, damage: Damage) -> int | None:
    ancestor = damage.model.fingerprint
    kept = model.kept("layers", ancestor)
    if kept is None:
        return None
    step = next(one for one in model.chain if one.source.ref.fingerprint == ancestor)
    return step.source.shape["layers"] - len(kept)


def _damage_caption(results: Results, damage: Damage, log: bool) -> list[Markup]:
    parts = [f"Perplexity on {damage.text}"]
    if damage.windows is not None and damage.window is not None:
        parts.append(f"{plural(damage.windows, 'window')} of {exact(damage.window)} tokens")
        parts += ["each after a BOS"] if damage.bos else []
    if log:
        parts.append("logarithmic scale")
    if len({one.model.fingerprint for one in results.damages}) > 1:
        parts.append(f"of {results.name_of(damage.model.fingerprint)}")
    sentence = ", ".join(parts) + "."
    broken = [one.criterion for one in damage.curves if not all(map(is_shown, one.perplexity))]
    if broken:
        sentence += f" Off every scale in places: {', '.join(broken)}."
    return [el("p", sentence, class_="small muted")]


def _damage_key(curves: Sequence[Curve], marks: dict[int, list[str]]) -> Markup:
    line = '<path d="M6 0V12" stroke-width="1.500" stroke-dasharray="2 2.500"/>'
    items = [
        el("li", glyph(line, "muted", 12), f"{', '.join(names)}, {removed} removed")
        for removed, names in marks.items()
    ]
    return series_key([curve.criterion for curve in curves], items)


def series_key(names: Sequence[str], *more: object) -> Markup:
    """What the lines of a drawing stand for; where colours come again, it is with other markers."""
    items = []
    for place, name in enumerate(names):
        shape = SHAPES[marker_of(place)]
        line = f'<path d="M0 6H30" stroke-width="2"/>{shape}'
        items.append(el("li", glyph(line, f"series-{place % len(SERIES)}"), name))
    return el("ul", items, *more, class_="key")


def _damage_numbers(curves: Sequence[Curve]) -> Markup:
    """The curves as a table, folded away: per step what was removed, and the perplexity."""
    rows = []
    for curve in curves:
        before: tuple[int, ...] = ()
        for removed, perplexity in zip(curve.removed, curve.perplexity, strict=True):
            new = [index for index in removed if index not in before]
            before = removed
            rows.append(
                el(
                    "tr",
                    el("th", curve.criterion, scope="row"),
                    el("td", len(removed)),
                    el("td", ", ".join(map(str, new)) or "–"),
                    el("td", figure(perplexity)),
                )
            )
    names = ("criterion", "removed", "this step", "perplexity")
    head = el("tr", [el("th", name, scope="col") for name in names])
    table = el("table", el("thead", head), el("tbody", rows), class_="plain")
    return el("details", el("summary", "The numbers"), scroll(table, "Damage by step"))
