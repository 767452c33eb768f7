"""A picture of the model: a cell a block, shaded by its score, the removed ones struck out."""

from __future__ import annotations

import math

from shearling.report.markup import Markup, el
from shearling.report.numbers import figure, plural, ranges
from shearling.report.records import Scores
from shearling.report.results import Model, Results
from shearling.report.sections import absent, section

CELLS_IN_A_ROW = 36


def anatomy_section(results: Results) -> Markup:
    """One strip for each model made, in the source's numbering."""
    title = "The model"
    source = results.source
    size = source.shape.get("layers") if source else None
    if source is None or size is None:
        return absent(title, "How many blocks it has is not known: `shearling score MODEL` tells.")
    scores = shading(results, source)
    names: dict[tuple[int, ...], list[str]] = {}  # a healed model has the blocks of the cut one
    for model in results.made:
        if (kept := model.kept("layers", source.fingerprint)) is not None:
            names.setdefault(kept, []).append(model.name)
    names = names or {tuple(range(size)): [source.name]}
    strips = [_strip(" and ".join(of), size, kept, scores) for kept, of in names.items()]
    key = [el("li", el("i", class_="swatch hollow"), "removed")] if results.made else []
    lines = []
    if scores:
        key.insert(0, el("li", "hurts less", el("i", class_="ramp"), "hurts more to remove"))
        lines.append(f"Shaded by rank under the criterion “{scores.criterion}”.")
    lines.append("Text enters at block 0 and leaves at the last.")
    others = _other_axes(results)
    return section(
        title,
        strips,
        el("ul", key, class_="key") if key else None,
        el("p", " ".join(lines + others), class_="small muted"),
    )


def shading(results: Results, model: Model) -> Scores | None:
    """The scores to shade by: those the primary model was cut by, or else the first there are."""
    found = [
        one
        for one in results.scores
        if one.model.fingerprint == model.fingerprint and one.axis == "layers"
    ]
    wanted = criterion_used(results)
    return next((one for one in found if one.criterion == wanted), found[0] if found else None)


def criterion_used(results: Results) -> str:
    """The criterion that the primary model's first cut followed, as its manifest says."""
    if results.primary is None:
        return "perplexity"
    used = [step.options.get("criterion") for step in results.primary.chain]
    return next((one for one in used if isinstance(one, str)), "perplexity")


def _strip(name: str, size: int, kept: tuple[int, ...], scores: Scores | None) -> Markup:
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
    summary = f"keeps {len(kept)} of {size}" if gone else plural(size, "block")
    return el(
        "div",
        el("h3", name, el("span", f", {summary}", class_="muted")),
        el(
            "div",
            cells,
            class_="strip",
            style=f"--columns:{math.ceil(size / rows)}",
            role="img",
            aria_label=label,
        ),
        el("p", f"Removed: {ranges(gone)}.", class_="small") if gone else None,
        class_="model",
    )


def _title(index: int, gone: bool, scores: Scores | None) -> str:
    score = f", score {figure(scores.scores[index])}" if _has(scores, index) and scores else ""
    return f"block {index}{', removed' if gone else ''}{score}"


def _has(scores: Scores | None, index: int) -> bool:
    return scores is not None and index < len(scores.scores)


def _shades(scores: Scores | None, size: int) -> list[float]:
    """Ink per block by rank: values span decades, and a shade tells few steps apart."""
    if scores is None or len(scores.scores) != size or size < 2:
        return [0.55] * size
    by_score = sorted(range(size), key=lambda index: (_sortable(scores.scores[index]), index))
    return [0.14 + 0.86 * by_score.index(index) / (size - 1) for index in range(size)]


def _sortable(score: float) -> float:
    return math.inf if math.isnan(score) else score


def _other_axes(results: Results) -> list[str]:
    """Widths are not drawn; where one was cut, a sentence says so."""
    source, model = results.source, results.primary
    if source is None or model is None:
        return []
    return [
        f"Its axis {axis} went from {before} to {model.shape[axis]}."
        for axis, before in source.shape.items()
        if axis != "layers" and model.shape.get(axis, before) != before
    ]
