"""The section on abilities: what is left of the source's, worst first."""

from __future__ import annotations

from shearling.evaluate.abilities.results import Abilities, AbilityFigures
from shearling.evaluate.abilities.shares import Share, mean_share, moved, shares
from shearling.report.decide.abilities import by_asking, percent
from shearling.report.draw.markup import Markup, el
from shearling.report.draw.sections import breakable, scroll, section
from shearling.report.numbers import THIN, exact, figure
from shearling.report.records.results import Model, Results

ALL = "all"


def abilities_section(results: Results) -> Markup | None:
    """A table for every set of items that was asked; nothing where none was."""
    groups = by_asking(results)
    if not groups:
        return None
    compared = any(_source_of(results, group) is not None and len(group) > 1 for group in groups)
    intro = (
        "Short questions with one right answer, made from a seed. First lines: what is left of the "
        f"source’s ability, by the probability of the right answers, with its 95{THIN}% interval; "
        f"in colour, less than 95{THIN}%. "
        if compared
        else "Short questions with one right answer, made from a seed. "
    ) + "Small: answers that are right to the letter, and nats a token of the right answers."
    return section("Abilities", el("p", intro), [_table(results, group) for group in groups])


def _source_of(results: Results, group: dict[str, Abilities]) -> Abilities | None:
    return group.get(results.source.fingerprint) if results.source else None


def _table(results: Results, group: dict[str, Abilities]) -> Markup:
    models = [model for model in results.models if model.fingerprint in group]
    source = _source_of(results, group)
    left: dict[str, dict[str, Share]] = {}
    for model in models:
        one = group[model.fingerprint]
        of_model = shares(source, one) if source is not None and one is not source else []
        if of_model:
            left[model.fingerprint] = {share.ability: share for share in of_model}
            left[model.fingerprint][ALL] = mean_share(of_model)
    names = list(dict.fromkeys(name for model in models
                               for name in group[model.fingerprint].abilities))  # fmt: skip
    names.sort(key=lambda name: min((of[name].left for of in left.values() if name in of),
                                    default=1.0))  # fmt: skip
    heads = [el("th", breakable(model.name), scope="col") for model in models]
    rows = [_row(name, models, group, left) for name in names]
    if left:
        cells = [
            el("td", _left(left.get(model.fingerprint, {}).get(ALL)),
               _moved(source, group[model.fingerprint]))
            for model in models
        ]  # fmt: skip
        label = el("th", el("b", "All"), el("small", "geometric mean"), scope="row")
        rows.append(el("tr", label, cells, class_="total"))
    table = el("table", el("thead", el("tr", el("td"), heads)), el("tbody", rows))
    one = next(iter(group.values()))
    asked = f"the first {exact(one.limit)} items of each" if one.limit else "all items"
    note = f"Seed {exact(one.seed)}, {asked}. Answers are greedy; free writing is sampled."
    return el("figure", scroll(table, "Abilities"), el("p", note, class_="small muted"))


def _row(
    name: str,
    models: list[Model],
    group: dict[str, Abilities],
    left: dict[str, dict[str, Share]],
) -> Markup:
    items = max(len(one.abilities[name].losses) for one in group.values() if name in one.abilities)
    cells = []
    for model in models:
        figures = group[model.fingerprint].abilities.get(name)
        share = left.get(model.fingerprint, {}).get(name)
        if figures is None:
            cells.append(el("td", el("span", "–", class_="muted", title="not measured")))
        else:
            cells.append(el("td", _left(share), el("small", _figures(figures))))
    return el("tr", el("th", name, el("small", f"{exact(items)} items"), scope="row"), cells)


def _left(share: Share | None) -> Markup | None:
    if share is None:
        return None
    low, high = share.interval
    around = el("span", f" {100 * low:.1f} to {100 * high:.1f}", class_="muted")
    return el("span", el("b", percent(share.left)) if share.low else percent(share.left), around,
              class_="worse" if share.low else None)  # fmt: skip


def _moved(source: Abilities | None, one: Abilities) -> Markup | None:
    if source is None or one is source:
        return None
    return el("small", f"moved {figure(moved(source, one)[0])} nats either way")


def _figures(one: AbilityFigures) -> str:
    if one.exact is None:
        return f"{percent(one.repetition_4 or 0.0)} of 4-grams repeat"
    return f"{100 * one.exact:.0f}{THIN}% exact, {figure(one.nll or 0.0)} nats"
