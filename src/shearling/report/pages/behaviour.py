"""How models write: how much they repeat themselves, and which of two a judge prefers."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from shearling.evaluate.results import Degeneration, Judgement, Repetition
from shearling.report.draw.markup import Markup, el
from shearling.report.draw.sections import breakable, scroll, section
from shearling.report.numbers import THIN, exact, plural
from shearling.report.records.fields import describe
from shearling.report.records.results import Results

WORSE = 1.1  # so many times the source's, a share of repetition is shown in colour

Rows = list[tuple[str, str, Callable[[Repetition], float | None], bool]]


def degeneration_section(results: Results) -> Markup | None:
    """A table a text and sampling; nothing where nobody measured it."""
    groups: dict[Hashable, list[Degeneration]] = {}
    names = {model.fingerprint for model in results.models}
    for one in results.degenerations:
        if one.model.fingerprint in names:
            groups.setdefault((one.text, one.new_tokens, describe(one.sampling)), []).append(one)
    if not groups:
        return None
    intro = (
        "What perplexity cannot see: how much of what a model writes it has written before. "
        "Beside it, the same of what people wrote on from the same prompts."
    )
    return section("Repetition", el("p", intro), [_table(results, of) for of in groups.values()])


def _table(results: Results, measured: list[Degeneration]) -> Markup:
    by_model = {one.model.fingerprint: one for one in measured}
    models = [model for model in results.models if model.fingerprint in by_model]
    reference = next((one.reference for one in measured if one.reference), None)
    orders = {
        int(order)
        for one in measured
        for order, share in one.distinct.items()
        if order.isdigit() and share is not None
    }
    rows: Rows = [
        (f"Distinct {n}-grams", "of all", lambda of, n=n: of.distinct.get(str(n)), True)
        for n in sorted(orders)
    ]
    rows += [
        ("Repeated 4-grams", "of all, in the same text", lambda of: of.repetition_4, False),
        ("Loops", "texts that end in one", lambda of: of.loops, False),
    ]
    heads = [el("th", breakable(model.name), scope="col") for model in models]
    if reference:
        heads.append(el("th", "what people wrote", scope="col"))
    body = []
    for label, note, of, more in rows:
        values = [of(by_model[model.fingerprint].written) for model in models]
        source = by_model.get(results.source.fingerprint) if results.source else None
        target = of(source.written) if source else None
        if any(value is not None for value in values):
            cells = [el("td", _share(value, target, more)) for value in values]
            last = el("td", _share(of(reference), None, more)) if reference else None
            body.append(el("tr", el("th", label, el("small", note), scope="row"), cells, last))
    table = el("table", el("thead", el("tr", el("td"), heads)), el("tbody", body))
    one = measured[0]
    lines = [f"Prompts from {one.text}"]
    lines += [f"{plural(one.prompts, 'prompt')}"] if one.prompts is not None else []
    lines += [f"{exact(one.new_tokens)} new tokens each"] if one.new_tokens is not None else []
    lines += [f"sampling: {describe(one.sampling)}"] if one.sampling else []
    return el(
        "figure", scroll(table, f"Repetition, {one.text}"),
        el("p", f"{', '.join(lines)}.", class_="small muted"),
    )  # fmt: skip


def _share(value: float | None, target: float | None, more_is_better: bool) -> object:
    """In colour what is clearly worse than the source's."""
    if value is None:
        return el("span", "–", class_="muted", title="not measured")
    text = f"{100 * value:.1f}{THIN}%"
    if target is None:
        return text
    far = value * WORSE < target if more_is_better else value > WORSE * target + 0.01
    return el("span", text, class_="worse") if far else text


def judgements_section(results: Results) -> Markup | None:
    """A row a pair of models; nothing where no judge was asked about these models."""
    names = {model.fingerprint: model.name for model in results.models}
    judgements = [
        one
        for one in results.judgements
        if one.a.fingerprint in names and one.b.fingerprint in names
    ]
    if not judgements:
        return None
    heads = [el("th", name, scope="col") for name in ("", "preferred", "wins, ties, losses")]
    rows = [
        el(
            "tr",
            el(
                "th", breakable(names[one.a.fingerprint]), el("span", " over ", class_="muted"),
                breakable(names[one.b.fingerprint]), el("small", _asked(one)), scope="row",
            ),
            el("td", _rate(one)),
            el("td", f"{exact(one.wins)}, {exact(one.ties)}, {exact(one.losses)}"),
        )
        for one in judgements
    ]  # fmt: skip
    table = el("table", el("thead", el("tr", heads)), el("tbody", rows))
    note = (
        f"How often a judge preferred the first model’s answer, ties counted half, with its "
        f"95{THIN}% interval; an interval that holds 50{THIN}% decides nothing."
    )
    return section("Judgements", scroll(table, "Judgements"), el("p", note, class_="small muted"))


def _asked(one: Judgement) -> str:
    prompts = f", {plural(one.prompts, 'prompt')}" if one.prompts is not None else ""
    return f"judged by {one.judge}{prompts}"


def _rate(one: Judgement) -> Markup:
    if one.win_rate is None:
        return el("span", "–", class_="muted", title="no verdict could be read")
    rate = f"{100 * one.win_rate:.1f}{THIN}%"
    if one.interval is None:
        return el("span", rate)
    low, high = one.interval
    decided = None if low <= 0.5 <= high else "better" if low > 0.5 else "worse"
    shown = el("b", rate) if decided else rate
    around = el("small", f"{100 * low:.1f} to {100 * high:.1f}{THIN}%")
    return el("span", shown, around, class_=decided if decided == "worse" else None)
