"""The top of a comparison page: which model to ship, and why, in plain words."""

from __future__ import annotations

from shearling.report import numbers
from shearling.report.decide.abilities import in_a_sentence
from shearling.report.decide.accuracy import beyond_noise, means
from shearling.report.decide.candidates import Field, Measure
from shearling.report.decide.choice import Decision
from shearling.report.draw.markup import Markup, el, join, render
from shearling.report.draw.sections import breakable, with_commands
from shearling.report.numbers import MINUS, THIN, figure, named, percent, plural, ratio
from shearling.report.pages.headline import tile
from shearling.report.pages.task_table import accuracy, points
from shearling.report.records.results import Model, Results

LONG = 24  # letters
SHOWN = 4  # sentences on beaten models; more are counted


def comparison_title(choice: Decision) -> str:
    """The page's name, in plain text."""
    names = [model.name for model in choice.field.models]
    listed = named(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} others"
    return f"{listed}: which to ship"


def verdict_header(results: Results, choice: Decision) -> Markup:
    """The answer, its figures, and what speaks for and against it."""
    field = choice.field
    picked = choice.pick if choice.pick is not field.baseline else None
    return el(
        "header",
        el("p", "shearling comparison", class_="kicker"),
        el("h1", _answer(choice), el("span", ": ", class_="unseen"),
           el("span", _reason(choice), class_="result")),
        el("dl", _tiles(choice, picked), class_="tiles") if picked else None,
        el("ul", [el("li", one) for one in _findings(results, choice)], class_="findings"),
    )  # fmt: skip


def _answer(choice: Decision) -> Markup:
    field = choice.field
    if len(field.models) == 1:
        return _name(field.baseline)
    if choice.pick is None:
        return render("No verdict yet")
    word = "Keep " if choice.pick is field.baseline else "Ship "
    return render([word, _name(choice.pick)])


def _name(model: Model) -> Markup:
    """Large type breaks a long name only."""
    return breakable(model.name) if len(model.name) > LONG else render(model.name)


def _share(choice: Decision) -> str:
    return f"{100 * choice.within:g}{THIN}%"


def _reason(choice: Decision) -> Markup:
    field, pick = choice.field, choice.pick
    if len(field.models) == 1:
        return render("one model: there is nothing to compare it with")
    if pick is None:
        return render(
            "the quality of the baseline was not measured, or no model was measured alike"
        )
    if pick is field.baseline:
        miss = choice.near_miss
        if miss is None:
            return render("no smaller model was measured on all that it was")
        return render(
            [f"no smaller model stays within {_share(choice)} of its quality; nearest is ",
             _name(miss), ", ", el("span", _lost(choice, miss), class_="worse")]
        )  # fmt: skip
    parts = [
        f"the smallest of {plural(len(field.models), 'model')} within {_share(choice)} of the "
        "baseline’s quality",
        *_gains(field, pick),
    ]
    return join(", ", parts)


def _gains(field: Field, model: Model) -> list[Markup]:
    """ "16 % smaller", "1.21× faster": what a model has over the baseline."""
    parts = []
    size = _changed(field.size, field.baseline, model)
    if size:
        way = "smaller" if field.size.better(model, field.baseline) else "larger"
        parts.append(el("b", f"{size.lstrip('+' + MINUS)} {way}"))
    if field.speed and (times := _times(field.speed, field.baseline, model)):
        faster = field.speed.better(model, field.baseline)
        slower = field.speed.better(field.baseline, model)
        words = f"{times} faster" if faster else f"at {times} the speed"
        parts.append(el("span", words, class_="worse") if slower else el("b", words))
    return parts


def _changed(measure: Measure, before: Model, after: Model) -> str | None:
    first, second = measure.of(before), measure.of(after)
    if first is None or second is None or first.value == second.value:
        return None
    return percent(first.value, second.value)


def _times(measure: Measure, before: Model, after: Model) -> str | None:
    first, second = measure.of(before), measure.of(after)
    return ratio(first.value, second.value) if first and second else None


def _lost(choice: Decision, model: Model) -> str:
    """ "mean accuracy of 3 tasks 61.2 rather than 62.0": where a model loses most."""
    baseline = choice.field.baseline
    worst = max(choice.deciding, key=lambda one: one.loss(baseline, model) or 0.0)
    return (
        f"with a {worst.name} of {_written(worst, model)} rather than {_written(worst, baseline)}"
    )


def cost(choice: Decision, model: Model) -> str:
    """What a model loses most of, in few words: "perplexity on wikitext 3.53×"."""
    baseline = choice.field.baseline
    worst = max(choice.deciding, key=lambda one: one.loss(baseline, model) or 0.0)
    before, after = worst.of(baseline), worst.of(model)
    if before is None or after is None:
        return ""
    if worst.kind == "accuracy":
        return f"accuracy {points(before.value, after.value)}"
    return f"{worst.name} {ratio(before.value, after.value)}"


def _written(measure: Measure, model: Model) -> str:
    value = measure.of(model)
    if value is None:
        return "–"
    return accuracy(value.value) if measure.kind == "accuracy" else figure(value.value)


def _tiles(choice: Decision, model: Model) -> list[Markup | None]:
    field, baseline = choice.field, choice.field.baseline
    tiles: list[Markup | None] = [_size_tile(field, model)]
    if field.speed and (speed := field.speed.of(model)) and (first := field.speed.of(baseline)):
        note = [f"from {figure(first.value)} · ", el("b", ratio(first.value, speed.value))]
        slower = bool(field.speed.better(baseline, model))
        tiles.append(tile("Decode", figure(speed.value), "tokens/s", note, slower))
    for measure in choice.deciding[:2]:
        before, after = measure.of(baseline), measure.of(model)
        if before is None or after is None:
            continue
        if measure.kind == "accuracy":
            changed = points(before.value, after.value)
        else:
            changed = ratio(before.value, after.value) or ""
        note = [f"from {_written(measure, baseline)} · ", el("b", changed)]
        unit = "%" if measure.kind == "accuracy" else ""
        worse = bool((measure.loss(baseline, model) or 0.0) > 0) and not measure.alike(
            baseline, model
        )
        label = measure.name[0].upper() + measure.name[1:]
        tiles.append(tile(label, _written(measure, model), unit, note, worse))
    return tiles


def _size_tile(field: Field, model: Model) -> Markup | None:
    before, after = field.size.of(field.baseline), field.size.of(model)
    if before is None or after is None:
        return None
    on_disk = "disk" in field.size.name
    write = numbers.disk if on_disk else numbers.count
    value, _, unit = write(int(after.value)).partition(THIN)
    note = [f"from {write(int(before.value))} · ", el("b", percent(before.value, after.value))]
    return tile("On disk" if on_disk else "Parameters", value, unit, note)


def _findings(results: Results, choice: Decision) -> list[Markup]:
    """One sentence each: noise, the fastest, the beaten, the broken, and what nobody measured."""
    return [
        *_noise(results, choice),
        *_abilities(choice),
        *_quickest(choice),
        *_fastest(choice),
        *_beaten(choice),
        *_broken(choice),
        *_unmeasured(choice),
        *_missing(choice),
    ]


def _noise(results: Results, choice: Decision) -> list[Markup]:
    """Whether the accuracy of the pick differs from the baseline's at all, if one can say."""
    baseline, pick = choice.field.baseline, choice.pick
    if pick is None or pick is baseline:
        return []
    table = means(results)
    before, after = table.get(baseline.fingerprint), table.get(pick.fingerprint)
    if before is None or after is None:
        return []
    differs = beyond_noise(before, after)
    said = points(before.value, after.value)
    words = {
        True: "which is more than chance explains",
        False: "which chance alone may explain",
        None: "and no standard error says whether that is chance",
    }[differs]
    line = [
        "In accuracy ",
        breakable(pick.name),
        " differs from the baseline by ",
        said,
        ", ",
        words,
    ]
    return [render([line, "."])]


def _abilities(choice: Decision) -> list[Markup]:
    """What is left of them in the pick, or in the model that was nearest to being it."""
    model = choice.pick if choice.pick is not choice.field.baseline else choice.near_miss
    left = choice.field.abilities.get(model.fingerprint) if model else None
    if model is None or not left:
        return []
    low = any(share.low for share in left)
    said = el("span", in_a_sentence(left), class_="worse" if low else None)
    return [render(["In ", breakable(model.name), ", ", said, "."])]


def _quickest(choice: Decision) -> list[Markup]:
    """What to ship where speed counts for more than size."""
    field, model = choice.field, choice.quickest
    if model is None or field.speed is None or model is field.baseline:
        return []
    times = _times(field.speed, field.baseline, model)
    size = _changed(field.size, field.baseline, model)
    line = [
        "If speed counts for more than size, ship ", el("b", breakable(model.name)),
        f": {times} the baseline’s decode speed", f", {size} in size" if size else "",
        f", also within {_share(choice)}.",
    ]  # fmt: skip
    return [render(line)]


def _fastest(choice: Decision) -> list[Markup]:
    field, fastest = choice.field, choice.fastest
    if fastest is None or field.speed is None or fastest is choice.quickest:
        return []
    times = _times(field.speed, field.baseline, fastest)
    if fastest is field.baseline:
        return [render(["Fastest is the baseline, ", el("b", breakable(fastest.name)), "."])]
    speed = f", {times} the baseline’s decode speed" if times else ""
    if fastest is choice.pick:
        return [render(["It is also the fastest", speed, ".", _as_fast(field, fastest)])]
    loss = choice.loss(fastest)
    cost = ""
    if loss is not None and loss > choice.within:
        cost = f", but {_lost(choice, fastest)}"
    line = ["Fastest is ", el("b", breakable(fastest.name)), speed, cost, "."]
    return [render([line, _as_fast(field, fastest)])]


def _as_fast(field: Field, fastest: Model) -> str:
    """The models whose runs overlap those of the fastest: which is faster, nobody knows."""
    speed = field.speed
    alike = [
        model.name
        for model in field.models
        if model is not fastest and speed and speed.better(fastest, model) is False
    ]
    return (
        f" Within the spread of its runs {'lies' if len(alike) == 1 else 'lie'} {named(alike)}."
        if alike
        else ""
    )


def _beaten(choice: Decision) -> list[Markup]:
    field = choice.field
    beaten = [model for model in field.models if model.fingerprint in choice.dominated]
    lines = []
    for model in beaten[:SHOWN]:
        winner = choice.dominated[model.fingerprint]
        ways = ("smaller", "faster", "better")
        measures = ([field.size], [field.speed] if field.speed else [], list(field.quality))
        ahead, even = [], []
        for way, of in zip(ways, measures, strict=True):
            known = [one for one in of if one.of(model) is not None]
            if any(_leads(one, winner, model) for one in known):
                ahead.append(way)
            elif known:
                even.append({"smaller": "larger", "faster": "slower", "better": "worse"}[way])
        rest = f", and no {' and no '.join(even)}" if even else ""
        lines.append(
            render(["Nobody should ship ", el("b", breakable(model.name)), ": ",
                    breakable(winner.name), f" is {named(ahead)}{rest}."])
        )  # fmt: skip
    if len(beaten) > SHOWN:
        more = len(beaten) - SHOWN
        lines.append(render(f"The same holds for {plural(more, 'other model')}: see the table."))
    return lines


def _leads(measure: Measure, one: Model, other: Model) -> bool:
    """Ahead in quality by its estimate, or in size or speed beyond what is told apart."""
    if measure.kind in ("size", "speed"):
        return bool(measure.better(one, other))
    return (measure.loss(one, other) or 0.0) > 0


def _broken(choice: Decision) -> list[Markup]:
    return [
        el("span", "The proof of surgery of ", breakable(model.name), " failed: do not use it.",
           class_="failed")
        for model in choice.broken
    ]  # fmt: skip


def _unmeasured(choice: Decision) -> list[Markup]:
    """Models that could not be picked since figures are missing, and which."""
    if not choice.deciding or len(choice.field.models) == 1:
        return []
    lines = []
    for model in choice.unmeasured:
        lacking = [one.name for one in choice.deciding if one.of(model) is None]
        lines.append(
            render([breakable(model.name), f" was not considered: it has no {named(lacking)} that "
                    "compares with the baseline’s."])
        )  # fmt: skip
    return lines


def _missing(choice: Decision) -> list[Markup]:
    hints = []
    if not choice.deciding:
        hints.append(
            "No quality was measured of the baseline: `--text FILE` measures perplexity, "
            "`--suite abilities` what a model can do, other suites tasks."
        )
    if choice.field.speed is None:
        hints.append("No speed was measured: `--bench` measures it.")
    return [with_commands(hint) for hint in hints]
