"""The two drawings of the report: scores per block, and damage against blocks removed."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from shearling.report.numbers import tick
from shearling.report.records import Curve
from shearling.report.vector import ACCENT, BAR, INK, MUTED, PAPER, SERIES

Draw = Callable[[Axes, bool], None]
BOUNDLESS = 1e12  # a perplexity from here on only says that nothing is left of the model
OFF_SCALE = 5.0  # so many times above all others, a bar is cut off and its value written instead
MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class Scale:
    """What a value axis shows: its ends, whether it is logarithmic, and who runs off it."""

    low: float
    high: float
    log: bool
    off: tuple[int, ...] = ()


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


def damage_plot(curves: Sequence[Curve], marked: int | None, scale: Scale) -> Draw:
    """One line a criterion; the first is drawn last, in the accent colour."""

    def draw(axes: Axes, narrow: bool) -> None:
        _value_axis(axes, scale)
        longest = max((len(one) for curve in curves for one in curve.removed), default=1)
        if marked is not None and 0 < marked <= longest:
            axes.axvline(marked, color=MUTED, linewidth=1, dashes=(2, 3), zorder=1)
        for place, curve in reversed(list(enumerate(curves))):
            axes.plot(
                [len(one) for one in curve.removed],
                [value if is_shown(value) else math.nan for value in curve.perplexity],
                color=SERIES[place % len(SERIES)],
                marker=MARKERS[place % len(MARKERS)],
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
