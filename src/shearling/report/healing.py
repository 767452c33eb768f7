"""The section on healing: held-out losses and the mix of domains over the tokens trained on."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from shearling.report.charts import series_key
from shearling.report.markup import Markup, el
from shearling.report.numbers import count, figure, plural
from shearling.report.plots import MARKERS, Draw
from shearling.report.records import Healing
from shearling.report.results import Results
from shearling.report.sections import scroll, section
from shearling.report.vector import MUTED, PAPER, SERIES, drawing

MOVED = 0.005  # a mix in which no weight moves further is not worth a picture


def healing_section(results: Results) -> Markup | None:
    """A drawing of losses for each run, and of weights where they moved; nothing without a run."""
    found = [one for one in results.healings if one.tokens]
    if not found:
        return None
    intro = el(
        "p",
        "Loss on held-out text of each domain while the model was trained, in nats a token; lower "
        "is better.",
    )
    return section("Healing", intro, [_run(results, *pair) for pair in enumerate(found)])


def _run(results: Results, place: int, one: Healing) -> Markup:
    what = f"{results.name_of(one.model.fingerprint)}, {one.recipe}, {count(one.tokens[-1])} tokens"
    label = f"Held-out loss of {plural(len(one.losses), 'domain')} against tokens"
    parts = [
        el("figcaption", el("h3", what)),
        series_key(list(one.losses)),
        drawing(lines(one.tokens, one.losses, "nats a token"), f"healing-{place}", label),
    ]
    if any(max(shares) - min(shares) > MOVED for shares in one.weights.values()):
        parts += [
            el("p", "Share of each domain in what it was trained on.", class_="small muted"),
            drawing(
                lines(one.tokens, one.weights, "share"), f"mix-{place}", "Shares of the domains"
            ),
        ]
    return el("figure", *parts, _numbers(one))


def lines(tokens: Sequence[int], values: dict[str, tuple[float, ...]], unit: str) -> Draw:
    """One line a domain; colours and markers are those of the key."""

    def draw(axes: Axes, narrow: bool) -> None:
        for place, series in enumerate(values.values()):
            axes.plot(
                tokens, series, color=SERIES[place % len(SERIES)], linewidth=1.8,
                marker=MARKERS[(place + place // len(MARKERS)) % len(MARKERS)], markersize=4.5,
                markeredgecolor=PAPER, markeredgewidth=0.8,
            )  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 8))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(round(value))))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("tokens", color=MUTED, labelpad=5)
        axes.set_ylabel(unit, color=MUTED)

    return draw


def _numbers(one: Healing) -> Markup:
    """First and last of every line, folded away."""
    rows = [
        el(
            "tr",
            el("th", domain, scope="row"),
            [el("td", figure(value)) for value in (losses[0], losses[-1])],
            [
                el("td", figure(value))
                for value in (one.weights[domain][0], one.weights[domain][-1])
            ],
        )
        for domain, losses in one.losses.items()
    ]
    names = ("domain", "loss before", "after", "share before", "after")
    head = el("tr", [el("th", name, scope="col") for name in names])
    table = el("table", el("thead", head), el("tbody", rows), class_="plain")
    return el("details", el("summary", "The numbers"), scroll(table, "Losses and shares by domain"))
