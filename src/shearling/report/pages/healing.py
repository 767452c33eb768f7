"""The section on healing: losses, excess over a reference, and the mix, over tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from shearling.files.results import public
from shearling.report.draw.markup import Markup, el
from shearling.report.draw.plots import Draw, marker_of
from shearling.report.draw.sections import scroll, section
from shearling.report.draw.vector import INK, MUTED, PAPER, SERIES, drawing
from shearling.report.numbers import amount, count, figure, plural, seconds, tick
from shearling.report.pages.charts import series_key
from shearling.report.records.results import Results
from shearling.report.records.training import Healing
from shearling.train.results import ReferenceLosses

MOVED = 0.005  # a mix in which no weight moves further is not worth a picture
OPEN = 2  # runs up to which each is shown by domain at once; of more, the others are folded
DENSE = 25  # looks on one line from which on markers would only thicken it
UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))


@dataclass(frozen=True)
class Line:
    """One line of a drawing: its values at these numbers of tokens, or at these times."""

    at: Sequence[float]
    values: Sequence[float]


def healing_section(results: Results) -> Markup | None:
    """All runs in one drawing, then each by domain; nothing without a run."""
    healings = [one for one in results.healings if one.tokens]
    if not healings:
        return None
    intro = el(
        "p",
        "Loss on held-out text while the model was trained, in nats a token; lower is better.",
    )
    together = [_together(results, *pair) for pair in enumerate(_comparable(healings))]
    healings.sort(key=lambda one: mean_loss(one)[-1])
    runs = [_run(results, place, one) for place, one in enumerate(healings)]
    if len(runs) > OPEN:
        runs = [
            runs[0],
            *(_folded(results, *pair) for pair in zip(healings[1:], runs[1:], strict=True)),
        ]
    return section("Healing", intro, together, runs)


def _folded(results: Results, one: Healing, run: Markup) -> Markup:
    return el("details", el("summary", f"{_title(results, one)}, by domain"), run)


def _comparable(runs: Sequence[Healing]) -> list[list[Healing]]:
    """Runs held out on the same domains, where there are several."""
    groups: dict[frozenset[str], list[Healing]] = {}
    for one in runs:
        groups.setdefault(frozenset(one.losses), []).append(one)
    return [group for group in groups.values() if len(group) > 1]


def mean_loss(one: Healing) -> tuple[float, ...]:
    """The mean over domains, each counted alike, at every look."""
    return tuple(map(fmean, zip(*one.losses.values(), strict=True)))


def _together(results: Results, place: int, group: list[Healing]) -> Markup:
    """One line a run: which recipe gets how far on how many tokens."""
    group = sorted(group, key=lambda one: mean_loss(one)[-1])
    names = [_title(results, one) for one in group]
    drawn = [Line(one.tokens, mean_loss(one)) for one in group]
    domains = sorted(group[0].losses)
    timed = all(one.seconds for one in group)
    rows = [
        el(
            "tr",
            el("th", name, scope="row"),
            el("td", count(one.tokens[-1])),
            [el("td", seconds(one.seconds[-1]))] if timed else None,
            el("td", figure(mean_loss(one)[0])),
            el("td", el("b", figure(mean_loss(one)[-1]))),
            [el("td", figure(one.losses[domain][-1])) for domain in domains],
        )
        for name, one in zip(names, group, strict=True)
    ]
    heads = ("run", "tokens", *["time"] * timed, "mean before", "after", *domains)
    return el(
        "figure",
        el("figcaption", el("h3", f"{plural(len(group), 'run')}, mean of the domains")),
        series_key(names),
        drawing(lines(drawn, "nats a token"), f"healings-{place}", "Mean loss of every run"),
        _over_time(group, f"times-{place}") if timed else None,
        numbers_table(heads, rows, "Losses by run; those of the domains after the run"),
    )


def _over_time(group: Sequence[Healing], prefix: str) -> list[Markup]:
    """The same losses over time: a step of one recipe may take as long as two of another."""
    longest = max(one.seconds[-1] for one in group)
    unit, step = next(pair for pair in UNITS if longest >= 2 * pair[1] or pair[1] == 1)
    drawn = [Line([at / step for at in one.seconds], mean_loss(one)) for one in group]
    return [
        el("p", "The same over the time of training, each as fast as its machine.",
           class_="small muted"),
        drawing(
            lines(drawn, "nats a token", over=f"{unit} of training"), prefix,
            "Mean loss of every run over time",
        ),
    ]  # fmt: skip


def _title(results: Results, one: Healing) -> str:
    return f"{results.name_of(one.model.fingerprint)}, {one.recipe}"


def _run(results: Results, place: int, one: Healing) -> Markup:
    """One run by domain."""
    took = f" in {seconds(one.seconds[-1])}" if one.seconds else ""
    title = f"{_title(results, one)}, {count(one.tokens[-1])} tokens{took}"
    return el("figure", el("figcaption", el("h3", title)), held_out(results, str(place), one))


def held_out(results: Results, place: str, one: Healing) -> list[Markup]:
    """Losses by domain, how far they are from a reference, and the mix if it moved."""
    domains = list(one.losses)
    parts = [
        series_key(domains),
        _drawn(one, one.losses, "nats a token", f"healing-{place}", "Held-out loss by domain"),
    ]
    reference = _reference(results, one)
    if reference:
        excess = {
            name: tuple(value - reference.losses[name] for value in losses)
            for name, losses in one.losses.items()
        }
        method = public(str(reference.how.get("method") or ""))
        how = f" ({method})" if method else ""
        parts += [
            el("p", f"Excess over the reference loss of each domain{how}.", class_="small muted"),
            _drawn(
                one,
                excess,
                "nats a token",
                f"excess-{place}",
                "Excess over the reference",
                zero=True,
            ),
        ]
    if any(max(shares) - min(shares) > MOVED for shares in one.weights.values()):
        parts += [
            el("p", "Share of each domain in what it was trained on.", class_="small muted"),
            _drawn(one, one.weights, "share", f"mix-{place}", "Shares of the domains", zero=True),
        ]
    return [*parts, _by_domain(one, reference)]


def _reference(results: Results, one: Healing) -> ReferenceLosses | None:
    """The losses that the run's mix followed, or else of a file, if they are of its domains."""
    own = ReferenceLosses(one.reference, how={"method": "which its mix followed"})
    known = [own, *results.references]
    return next((given for given in known if given.losses.keys() >= one.losses.keys()), None)


def _drawn(
    one: Healing, values: Mapping[str, Sequence[float]], unit: str, prefix: str, label: str,
    *, zero: bool = False,
) -> Markup:  # fmt: skip
    drawn = [Line(one.tokens, series) for series in values.values()]
    return drawing(lines(drawn, unit, zero=zero), prefix, f"{label}, {plural(len(drawn), 'line')}")


def lines(
    drawn: Sequence[Line], unit: str, *, zero: bool = False, over: str = "tokens trained on"
) -> Draw:
    """Values over tokens, with zero or where they lie; colours and markers are the key's."""

    def draw(axes: Axes, narrow: bool) -> None:
        for place, one in enumerate(drawn):
            axes.plot(
                one.at, one.values, color=SERIES[place % len(SERIES)], linewidth=1.8,
                marker=marker_of(place), markersize=6.5, markeredgecolor=PAPER, markeredgewidth=0.8,
                markevery=max(1, len(one.at) // DENSE),
            )  # fmt: skip
        if zero:
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, 0.0), max(high, 0.0))
            axes.axhline(0.0, color=INK, linewidth=1.0, dashes=(5, 3), zorder=1)
        axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 8))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(float(value))))
        axes.set_xlabel(over, color=MUTED, labelpad=5)
        axes.set_ylabel(unit, color=MUTED)

    return draw


def _by_domain(one: Healing, reference: ReferenceLosses | None) -> Markup:
    """First and last of every line, folded away."""
    rows = []
    for domain, losses in one.losses.items():
        shares = one.weights[domain]
        values = [losses[0], losses[-1]]
        values += [reference.losses[domain]] if reference else []
        values += [shares[0], shares[-1]]
        rows.append(
            el("tr", el("th", domain, scope="row"), [el("td", figure(value)) for value in values])
        )
    reference_head = ("reference",) if reference else ()
    heads = ("domain", "loss before", "after", *reference_head, "share before", "after")
    return numbers_table(heads, rows, "Losses and shares by domain")


def numbers_table(heads: Sequence[str], rows: Sequence[Markup], label: str) -> Markup:
    """A table, folded away."""
    head = el("tr", [el("th", name, scope="col") for name in heads])
    table = el("table", el("thead", head), el("tbody", rows), class_="plain")
    return el("details", el("summary", "The numbers"), scroll(table, label))
