"""Drawings of the report: scores per block, damage as blocks go, and many ways side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from shearling.evaluate.results import Curve
from shearling.report.draw.vector import ACCENT, BAR, INK, LINE, MUTED, PAPER, SERIES
from shearling.report.numbers import amount, tick

Draw = Callable[[Axes, bool], None]
BOUNDLESS = 1e12  # a perplexity from here on only says that nothing is left of the model
OFF_SCALE = 5.0  # so many times above all others, a bar is cut off and its value written instead
TICKS = ((1.0, 1.5, 2.0, 3.0, 5.0, 7.0), (1.0, 2.0, 5.0), (1.0, 3.0), (1.0,))  # in a decade
POINTS = 240  # on one line: more would only weigh
MARKERS = ("o", "s", "^", "D", "v", "P")


def marker_of(place: int) -> str:
    """Of the series at a place: after six, another than that of the series six before."""
    return MARKERS[(place + place // len(MARKERS)) % len(MARKERS)]


@dataclass(frozen=True)
class Scale:
    """What a value axis shows: its ends, whether it is logarithmic, and who runs off it."""

    low: float
    high: float
    log: bool
    off: tuple[int, ...] = ()


@dataclass(frozen=True)
class Span:
    """The ends of a value axis that several drawings share."""

    low: float
    high: float
    log: bool


def log_ticks(low: float, high: float, most: int, also: float | None = None) -> list[float]:
    """Round numbers between two ends of a logarithmic axis, at most so many.

    ``also`` gets a tick of its own, and round numbers that would touch it give way.
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in TICKS:
        ticks = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
        if len(ticks) <= most:
            break
    if also is not None and low <= also <= high:
        room = 0.6 * math.log(high / low) / most
        ticks = [one for one in ticks if abs(math.log(one / also)) > room]
        ticks = sorted([also, *ticks])
    return ticks[:: math.ceil(len(ticks) / most)] if len(ticks) > most + 1 else ticks


def is_shown(value: float) -> bool:
    """Whether a value has a place on an axis."""
    return math.isfinite(value) and abs(value) < BOUNDLESS


def scale_of(values: Sequence[float], baseline: float | None = None, log_from: float = 30) -> Scale:
    """Choose an axis on which most values can be told apart.

    Up to three values that lie far above all others (the first block, as a rule) are let run off
    the axis: on a common axis they would press the others flat. From a largest / smallest of
    ``log_from`` on, the axis is logarithmic.
    """
    finite = sorted((v, i) for i, v in enumerate(values) if is_shown(v))
    off: list[int] = [i for i, v in enumerate(values) if v >= BOUNDLESS]
    for cut in (3, 2, 1):
        if len(finite) > 3 * cut and finite[-cut][0] > OFF_SCALE * max(finite[-cut - 1][0], 0):
            off += [i for _, i in finite[-cut:]]
            finite = finite[:-cut]
            break
    shown = [v for v, _ in finite] + ([baseline] if baseline is not None else [])
    low, high = min(shown, default=0.0), max(shown, default=1.0)
    if low > 0 and high / low >= log_from:
        pad = (high / low) ** 0.06
        return Scale(low / pad, high * pad**2, True, tuple(sorted(off)))
    if low > 0 and low > 0.5 * high:  # close together and far from zero: zero would hide them
        pad = 0.08 * (high - low) or 0.1 * abs(high)
        return Scale(low - pad, high + 2 * pad, False, tuple(sorted(off)))
    pad = 0.08 * (high - min(low, 0.0)) or 1.0
    return Scale(min(low * 1.08, 0.0), high + pad, False, tuple(sorted(off)))


def scores_plot(
    values: Sequence[float],
    removed: Collection[int],
    protected: Collection[int],
    baseline: float | None,
    scale: Scale,
) -> Draw:
    """Bars by index; the removed ones in the accent colour, the protected ones marked below."""
    groups = (
        (BAR, [i for i in range(len(values)) if i not in removed]),
        (ACCENT, [i for i in range(len(values)) if i in removed]),
    )

    def draw(axes: Axes, narrow: bool) -> None:
        _value_axis(axes, scale)
        foot = scale.low if scale.log else max(scale.low, 0.0)
        for colour, indices in groups:
            _bars(axes, [(i, values[i]) for i in indices], foot, scale.high, colour)
        for index in scale.off:
            _break_mark(axes, index)
        if baseline is not None:
            axes.axhline(baseline, color=INK, linewidth=1.1, dashes=(5, 3), zorder=3)
        if protected:
            height = [-0.032 if not narrow else -0.038] * len(protected)
            axes.plot(
                sorted(protected),
                height,
                linestyle="none",
                marker="^",
                markersize=6 if len(values) <= 60 and not narrow else 4,
                color=INK,
                transform=axes.get_xaxis_transform(),
                clip_on=False,
                zorder=4,
            )
        _index_axis(axes, len(values), narrow, bool(protected))

    return draw


def damage_plot(curves: Sequence[Curve], marked: Sequence[int], scale: Scale) -> Draw:
    """One line a criterion; the first is drawn last, in the accent colour."""

    def draw(axes: Axes, narrow: bool) -> None:
        _value_axis(axes, scale)
        longest = max((len(one) for curve in curves for one in curve.removed), default=1)
        for removed in marked:
            if 0 < removed <= longest:
                axes.axvline(removed, color=MUTED, linewidth=1, dashes=(2, 3), zorder=1)
        for place, curve in reversed(list(enumerate(curves))):
            axes.plot(
                [len(one) for one in curve.removed],
                [value if is_shown(value) else math.nan for value in curve.perplexity],
                color=SERIES[place % len(SERIES)],
                marker=marker_of(place),
                markersize=5.5 if place == 0 else 4.5,
                markeredgecolor=PAPER,
                markeredgewidth=0.8,
                linewidth=2.4 if place == 0 else 1.6,
                zorder=4 if place == 0 else 3,
            )
        axes.set_xlim(-0.3, longest + 0.3)
        axes.xaxis.set_major_locator(MaxNLocator(6 if narrow else 12, integer=True, min_n_ticks=1))
        axes.set_xlabel("blocks removed", color=MUTED, labelpad=5)

    return draw


def dots_plot(
    labels: Sequence[str],
    rows: Sequence[Sequence[float]],
    span: Span,
    baseline: float | None,
    unit: str,
) -> Draw:
    """A line a label with a dot a variant, joined; the values of one label are one row."""

    def draw(axes: Axes, narrow: bool) -> None:
        for at, values in enumerate(rows):
            shown = [value for value in values if value <= span.high]
            if len(shown) > 1:
                axes.plot((min(shown), max(shown)), (at, at), color=BAR, linewidth=1.4, zorder=2)
            _dots(axes, at, values, span)
        if baseline is not None and not math.isnan(baseline):
            axes.axvline(baseline, color=INK, linewidth=1.1, dashes=(3, 2.5), zorder=1)
        if span.log:
            axes.set_xscale("log")
            axes.set_xticks(log_ticks(span.low, span.high, 4 if narrow else 10))
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 8))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(float(value))))
        axes.set_xlim(span.low, span.high)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.grid(axis="x", color=LINE, linewidth=0.8)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_xlabel(unit, color=MUTED, labelpad=5)

    return draw


def sizes_plot(
    steps: Sequence[int],
    expected: Sequence[float],
    wanted: Sequence[float],
    target: int,
    units: int,
) -> Draw:
    """Open gates of a row at every step: what there was on what was wanted, and the target."""
    shown = thinned(len(steps))
    at = [steps[index] for index in shown]

    def draw(axes: Axes, narrow: bool) -> None:
        for values, colour, width in ((wanted, BAR, 6.0), (expected, SERIES[1], 1.8)):
            axes.plot(
                at, [values[index] for index in shown], color=colour, linewidth=width,
                solid_capstyle="butt", zorder=3,
            )  # fmt: skip
        axes.axhline(target, color=INK, linewidth=1.1, dashes=(5, 3), zorder=2)
        low, high = min(target, *expected, *wanted), max(units, *expected, *wanted)
        pad = 0.1 * (high - low) or 1.0
        axes.set_ylim(max(0.0, low - pad), high + pad)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(float(value))))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=high - low >= 2))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(float(value))))
        axes.set_xlabel("step", color=MUTED, labelpad=3)

    return draw


def histogram_plot(counts: Sequence[int], unit: str) -> Draw:
    """How many lie in each of equal parts of the range from 0 to 1."""

    def draw(axes: Axes, narrow: bool) -> None:
        high = 1.05 * max(*counts, 1)
        _bars(axes, [(i, float(n)) for i, n in enumerate(counts) if n], 0.0, high, BAR)
        axes.set_xlim(-0.7, len(counts) - 0.3)
        axes.set_ylim(0, high)
        axes.set_xticks([len(counts) * share - 0.5 for share in (0, 0.5, 1)], ["0", "0.5", "1"])
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(float(value))))
        axes.set_xlabel(unit, color=MUTED, labelpad=3)

    return draw


def thinned(size: int, most: int = POINTS) -> list[int]:
    """Evenly spread indices of a long series, its ends among them."""
    if size <= most:
        return list(range(size))
    return [round(place * (size - 1) / (most - 1)) for place in range(most)]


def _dots(axes: Axes, at: int, values: Sequence[float], span: Span) -> None:
    """The variants of one line; one that lies beyond the axis is written at its edge."""
    beyond = sorted(value for value in values if value > span.high)
    if beyond:
        labels = [tick(float(f"{one:.2g}")) if is_shown(one) else "∞" for one in beyond]
        axes.annotate(
            f"{' … '.join(dict.fromkeys((labels[0], labels[-1])))} →", (span.high, at),
            xytext=(-3, 0), textcoords="offset points", ha="right", va="center", fontsize=10.5,
            color=MUTED,
        )  # fmt: skip
    for place, value in enumerate(values):
        if not value <= span.high:  # NaN as well
            continue
        axes.plot(
            value, at, linestyle="none", marker=marker_of(place), markersize=8,
            color=SERIES[place % len(SERIES)], markeredgecolor=PAPER, markeredgewidth=0.8,
            clip_on=False, zorder=4,
        )  # fmt: skip


def _value_axis(axes: Axes, scale: Scale) -> None:
    axes.set_ylim(scale.low, scale.high)
    if scale.log:
        axes.set_yscale("log")
        axes.set_ylim(scale.low, scale.high)
        decades = math.log10(scale.high / scale.low)
        steps = (1.0, 2.0, 5.0) if decades < 2.2 else (1.0, 3.0) if decades < 3.5 else (1.0,)
        axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(float(value))))


def _bars(
    axes: Axes, values: Sequence[tuple[int, float]], foot: float, top: float, colour: str
) -> None:
    """All bars of one colour as one path: a tenth of the bytes of a path each."""
    rectangles = []
    for index, value in values:
        if math.isnan(value):
            continue
        left, right, height = index - 0.38, index + 0.38, min(value, top)
        corners = [(left, foot), (left, height), (right, height), (right, foot), (left, foot)]
        rectangles.append(Path(np.array(corners), closed=True))
    if rectangles:
        path = Path.make_compound_path(*rectangles)
        axes.add_patch(PathPatch(path, facecolor=colour, edgecolor="none", linewidth=0, zorder=2))


def _break_mark(axes: Axes, index: int) -> None:
    """Two strokes in the page's colour across the top of a bar that runs off the axis."""
    across = axes.get_xaxis_transform()
    for height in (0.86, 0.91):
        axes.plot(
            (index - 0.62, index + 0.62),
            (height - 0.02, height + 0.02),
            color=PAPER,
            linewidth=2,
            transform=across,
            zorder=5,
        )


def _index_axis(axes: Axes, size: int, narrow: bool, marked: bool) -> None:
    axes.set_xlim(-0.8, size - 0.2)
    room = 8 if narrow else 26
    step = next(one for one in (1, 2, 5, 10, 20, 50, 100, 1000) if size / one <= room)
    axes.set_xticks(range(0, size, step))
    if marked:
        axes.tick_params(axis="x", pad=13, length=0)
    axes.set_xlabel("block", color=MUTED, labelpad=5)
