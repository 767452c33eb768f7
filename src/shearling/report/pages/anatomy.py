"""A picture of the model: a cell a block, shaded by its score, the removed ones struck out; a bar
for every width that was cut; and, where heads were chosen block by block, a row a block with them.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

from shearling.report.decide.compare import AXES, sizes_changed
from shearling.report.draw.markup import Markup, el, render
from shearling.report.draw.sections import absent, section
from shearling.report.numbers import exact, figure, named, percent, plural, ranges
from shearling.report.pages.units import units_kept, units_section
from shearling.report.records.records import BlockScores
from shearling.report.records.results import Model, Results

CELLS_IN_A_ROW = 36


def anatomy_section(results: Results) -> Markup:
    """One strip for each model made, in the source's numbering."""
    drawn = anatomy(results)
    if drawn is None:
        hint = "How many blocks it has is not known: `shearling score MODEL` tells."
        return absent("The model", hint)
    return section("The model", drawn)


def anatomy(results: Results) -> list[Markup | None] | None:
    """The strips with their key, or None where the source's blocks are not known."""
    source = results.source
    size = source.shape.get("layers") if source else None
    if source is None or size is None:
        return None
    scores = shading(results, source)
    alike: dict[Hashable, list[Model]] = {}  # a healed model is drawn with the cut one
    for model in results.made:
        if (kept := model.kept("layers", source.fingerprint)) is not None:
            cut = (*sizes_changed(source, model).items(), *units_kept(source, model))
            alike.setdefault((kept, *cut), []).append(model)
    groups = list(alike.values()) or [[source]]
    strips = [_drawn(source, of, scores, one=results.primary in of) for of in groups]
    cut = any(sizes_changed(source, of[0]) for of in groups)
    key = [el("li", el("i", class_="swatch hollow"), "removed")] if cut else []
    lines = []
    if scores:
        key.insert(0, el("li", "hurts less", el("i", class_="ramp"), "hurts more to remove"))
        lines.append(f"Shaded by rank under the criterion “{scores.criterion}”.")
    lines.append("Text enters at block 0 and leaves at the last.")
    return [
        *strips,
        el("ul", key, class_="key") if key else None,
        el("p", " ".join(lines), class_="small muted"),
    ]


def shading(results: Results, model: Model) -> BlockScores | None:
    """The scores to shade by: those the primary model was cut by, or else the first there are."""
    scores = [
        one
        for one in results.scores
        if one.model.fingerprint == model.fingerprint and one.axis == "layers"
    ]
    wanted = criterion_used(results)
    return next((one for one in scores if one.criterion == wanted), scores[0] if scores else None)


def criterion_used(results: Results) -> str:
    """The criterion that the primary model's first cut followed, as its manifest says."""
    if results.primary is None:
        return "perplexity"
    used = [step.options.get("criterion") for step in results.primary.chain]
    return next((one for one in used if isinstance(one, str)), "perplexity")


def _drawn(
    source: Model, models: Sequence[Model], scores: BlockScores | None, *, one: bool
) -> Markup:
    """The blocks and widths of models that have them all alike; units of ``one`` are unfolded."""
    size, name = source.shape["layers"], named([model.name for model in models])
    kept = models[0].kept("layers", source.fingerprint)
    changed = sizes_changed(source, models[0])
    changed.pop("layers", None)
    strip = _strip(size, tuple(range(size)) if kept is None else kept, scores)
    units = units_section(source, models[0])
    if units and not one:
        units = el("details", el("summary", "Which heads and channels"), units)
    if kept is None or (len(kept) == size and not changed):
        summary = plural(size, "block") + ("" if kept is None else ", none removed")
    elif len(kept) == size:
        summary = f"keeps all {plural(size, 'block')}, {_less(changed)}"
    else:
        less = f", {_less(changed)}" if changed else ""
        summary = f"keeps {len(kept)} of {plural(size, 'block')}{less}"
    heading = el("h3", name, el("span", f", {summary}", class_="muted"))
    return el("div", heading, strip, _widths(changed) if changed else None, units, class_="model")


def _less(changed: Mapping[str, tuple[int, int]]) -> str:
    words = ["narrower"] if changed.keys() - {"vocab"} else []
    return " with ".join([*words, "fewer tokens"] if "vocab" in changed else words)


def _widths(changed: Mapping[str, tuple[int, int]]) -> Markup:
    """A bar an axis: what is left of its length, and what is gone."""
    rows = []
    for axis, (before, after) in changed.items():
        label = AXES.get(axis, axis)
        where = "" if axis in ("hidden", "vocab") else " in each block"
        left = min(1.0, after / before) if before else 1.0
        track = el(
            "span",
            el("i", style=f"width:{100 * left:.2f}%"),
            class_="track",
            role="img",
            aria_label=f"{label}: {exact(after)} of {exact(before)}{where}",
        )
        share = percent(before, after)
        sizes = [
            el("b", f"{exact(after)} of {exact(before)}"),
            el("span", f"{where}, {share}", class_="muted"),
        ]
        rows.append(el("li", el("span", label), track, el("span", sizes, class_="sizes")))
    return el("ul", rows, class_="widths")


def _strip(size: int, kept: tuple[int, ...], scores: BlockScores | None) -> Markup:
    gone = sorted(set(range(size)) - set(kept))
    shades = _shades(scores, size)
    rows = math.ceil(size / CELLS_IN_A_ROW)
    cells = [
        el(
            "span",
            el("i", style=f"--shade:{shades[index]:.2f}"),
            index,
            class_="block gone" if index in gone else "block",
            title=_title(index, index in gone, scores),
        )
        for index in range(size)
    ]
    label = f"{plural(size, 'block')}; removed: {ranges(gone)}"
    columns = f"--columns:{math.ceil(size / rows)}"
    line = f"Removed: {'block' if len(gone) == 1 else 'blocks'} {ranges(gone)}."
    return render(
        [
            el("div", cells, class_="strip", style=columns, role="img", aria_label=label),
            el("p", line, class_="small") if gone else None,
        ]
    )


def _title(index: int, gone: bool, scores: BlockScores | None) -> str:
    score = f", score {figure(scores.scores[index])}" if _has(scores, index) and scores else ""
    return f"block {index}{', removed' if gone else ''}{score}"


def _has(scores: BlockScores | None, index: int) -> bool:
    return scores is not None and index < len(scores.scores)


def _shades(scores: BlockScores | None, size: int) -> list[float]:
    """Ink per block by rank: values span decades, and a shade tells few steps apart."""
    if scores is None or len(scores.scores) != size or size < 2:
        return [0.55] * size
    by_score = sorted(range(size), key=lambda index: (_sortable(scores.scores[index]), index))
    return [0.14 + 0.86 * by_score.index(index) / (size - 1) for index in range(size)]


def _sortable(score: float) -> float:
    return math.inf if math.isnan(score) else score
