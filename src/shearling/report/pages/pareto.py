"""Quality against size and against speed: every model a point, with the front of those unbeaten."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from shearling.report import numbers
from shearling.report.decide.candidates import Measure, Value
from shearling.report.decide.choice import front
from shearling.report.draw.plots import Draw, is_shown, log_ticks
from shearling.report.draw.vector import BAR, INK, LINE, MUTED, PAPER, UNITS_PER_INCH
from shearling.report.numbers import tick
from shearling.report.records.results import Model

LETTER = 6.3  # CSS pixels that a letter of a label takes, about: the page's font is not ours
HEIGHT = 15.0
STEP = 5.0  # CSS pixels between two places of a line that names keep off
LONGEST = (26, 18)  # letters of a label, on a wide page and on a phone
FAR = 3.0  # from a largest / smallest of this on, a perplexity's axis is logarithmic


@dataclass(frozen=True)
class FrontPoint:
    """One model in one drawing."""

    label: str
    x: Value
    y: Value
    ahead: bool  # on the front
    chosen: bool
    first: bool  # the baseline


def points_of(
    models: Sequence[Model], across: Measure, up: Measure, chosen: Model | None
) -> list[FrontPoint]:
    """The models that have both figures; which of them no other beats in both."""
    measured = [
        (model, x, y)
        for model in models
        if (x := across.of(model))
        and (y := up.of(model))
        and is_shown(x.value)
        and is_shown(y.value)
    ]
    ahead = front([model for model, _, _ in measured], across, up)
    return [
        FrontPoint(model.name, x, y, is_ahead, model is chosen, model is models[0])
        for (model, x, y), is_ahead in zip(measured, ahead, strict=True)
    ]


def pareto_plot(points: Sequence[FrontPoint], across: Measure, up: Measure) -> Draw:
    """The points with their intervals and names, the front as a line; better is always up."""

    def draw(axes: Axes, narrow: bool) -> None:
        _axes(axes, points, across, up, narrow)
        axes.plot(*zip(*_front(points), strict=True), color=INK, linewidth=1.3, zorder=2)
        for bar in _bars(points, across):
            axes.plot(*zip(*bar, strict=True), color=BAR, linewidth=1.2, zorder=2)
        for one in points:
            colour = INK if one.ahead else BAR
            axes.plot(
                one.x.value, one.y.value, linestyle="none", marker="s" if one.first else "o",
                markersize=8, color=colour if one.ahead else PAPER, markeredgecolor=colour,
                markeredgewidth=1.4, clip_on=False, zorder=4,
            )  # fmt: skip
            if one.chosen:
                axes.plot(one.x.value, one.y.value, linestyle="none", marker="o", markersize=15,
                          color="none", markeredgecolor=INK, markeredgewidth=1.4, clip_on=False,
                          zorder=4)  # fmt: skip
        _label(axes, points, across, LONGEST[narrow])

    return draw


Line = list[tuple[float, float]]


def _front(points: Sequence[FrontPoint]) -> Line:
    """The corners of the line through those that no other beats."""
    return sorted((one.x.value, one.y.value) for one in points if one.ahead)


def _bars(points: Sequence[FrontPoint], across: Measure) -> list[Line]:
    """The intervals that are wide enough to be seen."""
    bars: list[Line] = [
        [(one.x.value, one.y.low), (one.x.value, one.y.high)]
        for one in points
        if one.y.high > one.y.low
    ]
    if across.kind == "speed":
        bars += [
            [(one.x.low, one.y.value), (one.x.high, one.y.value)]
            for one in points
            if one.x.high > one.x.low
        ]
    return bars


def _axes(
    axes: Axes, points: Sequence[FrontPoint], across: Measure, up: Measure, narrow: bool
) -> None:
    low, high = _ends([one.x for one in points], 0.16)
    axes.set_xlim(max(low, 0.0), high)
    axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _size(float(value), across)))
    axes.set_xlabel(_titled(across), color=MUTED, labelpad=5)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    values = [one.y for one in points]
    smallest = min(one.low for one in values)
    if up.kind == "perplexity" and max(one.high for one in values) > FAR * smallest:
        pad = (max(one.high for one in values) / smallest) ** 0.14
        low, high = smallest / pad, max(one.high for one in values) * pad
        axes.set_yscale("log")
        axes.set_yticks(log_ticks(low, high, 6))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        low, high = _ends(values, 0.14)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    scale = 100 if up.kind == "accuracy" else 1
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(_round(value * scale))))
    axes.set_ylim((low, high) if up.higher_is_better else (high, low))


def _round(value: float) -> float:
    """Without what floating point adds to a round number."""
    return float(f"{value:.6g}")


def _ends(values: Sequence[Value], room: float) -> tuple[float, float]:
    low, high = min(one.low for one in values), max(one.high for one in values)
    pad = room * (high - low) or 0.1 * abs(high) or 1.0
    return low - pad, high + pad


def _size(value: float, measure: Measure) -> str:
    if measure.kind == "speed":
        return tick(_round(value))
    if value <= 0:
        return "0"
    write = numbers.disk if "disk" in measure.name else numbers.count
    return write(round(value)).replace(".0" + numbers.THIN, numbers.THIN)


def _titled(measure: Measure) -> str:
    if measure.kind == "speed":
        return "decoded tokens/s (right is better)"
    return f"{measure.name} (left is better)"


def shortened(name: str, longest: int) -> str:
    """A name that is too long, without its middle: both its ends tell models apart."""
    if len(name) <= longest:
        return name
    head = (longest - 1) * 2 // 5
    return f"{name[:head]}…{name[-(longest - 1 - head) :]}"


def labels(names: Sequence[str], longest: int) -> list[str]:
    """Names that fit; where they differ only in what was left out, without how all begin."""
    short = [shortened(name, longest) for name in names]
    if len(set(short)) < len(set(names)):
        same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
        alike = len(list(same))
        short = [shortened(f"…{name[alike:]}", longest) for name in names]
    return short


Box = tuple[float, float, float, float]  # left, bottom, right, top, in CSS pixels


def _label(axes: Axes, points: Sequence[FrontPoint], across: Measure, longest: int) -> None:
    """Names beside the points, each where it covers least of what is there already."""
    figure = axes.get_figure()
    assert figure is not None
    per_pixel = UNITS_PER_INCH / figure.dpi
    frame = axes.get_window_extent()
    inside = (
        frame.x0 * per_pixel,
        frame.y0 * per_pixel,
        frame.x1 * per_pixel,
        frame.y1 * per_pixel,
    )
    at = [_pixels(axes, one.x.value, one.y.value, per_pixel) for one in points]
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in at]
    for line in (_front(points), *_bars(points, across)):
        taken += _along([_pixels(axes, *corner, per_pixel) for corner in line])
    texts = labels([one.label for one in points], longest)
    # those on the front choose their places first
    for place in sorted(range(len(points)), key=lambda index: not points[index].ahead):
        one, (x, y) = points[place], at[place]
        text = texts[place]
        boxes = _places(x, y, LETTER * len(text))
        best = min(boxes, key=lambda box: _covered(box, taken, inside) + 2 * boxes.index(box))
        taken.append(best)
        middle = ((best[0] + best[2]) / 2 - x, (best[1] + best[3]) / 2 - y)
        axes.annotate(
            text, (one.x.value, one.y.value), xytext=middle, textcoords="offset points",
            ha="center", va="center", fontsize=11, color=INK if one.ahead else MUTED, zorder=5,
            annotation_clip=False,
        )  # fmt: skip


def _pixels(axes: Axes, x: float, y: float, per_pixel: float) -> tuple[float, float]:
    """Where a point of the drawing lies, in CSS pixels."""
    across, up = axes.transData.transform((x, y))
    return float(across) * per_pixel, float(up) * per_pixel


def _along(line: Line) -> list[Box]:
    """Small boxes along a line of CSS pixels, for names to keep off."""
    boxes = []
    for (x, y), (u, v) in pairwise(line):
        steps = max(1, round(math.hypot(u - x, v - y) / STEP))
        for step in range(steps + 1):
            a, b = x + (u - x) * step / steps, y + (v - y) * step / steps
            boxes.append((a - 2, b - 2, a + 2, b + 2))
    return boxes


def _places(x: float, y: float, width: float) -> list[Box]:
    """Where a name may stand: right, left, above, below, and at the corners, then further off."""
    boxes = []
    for off in (10.0, 24.0, 38.0):
        boxes += (
            [
                (x + 10, y - HEIGHT / 2, x + 10 + width, y + HEIGHT / 2),
                (x - 10 - width, y - HEIGHT / 2, x - 10, y + HEIGHT / 2),
            ]
            if off == 10.0
            else []
        )
        for low in (y + off, y - off - HEIGHT):
            for left in (x - width / 2, x, x - width):
                boxes.append((left, low, left + width, low + HEIGHT))
    return boxes


def _covered(box: Box, taken: Sequence[Box], inside: Box) -> float:
    """Square pixels over other things, and, weighing more, outside the drawing."""
    over = sum(_shared(box, other) for other in taken)
    area = (box[2] - box[0]) * (box[3] - box[1])
    return over + 4 * (area - _shared(box, inside))


def _shared(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height) if math.isfinite(width + height) else 0.0
