"""Turns a matplotlib figure into SVG that can live inside a page.

Colours are drawn as stand-ins and written as CSS variables, so one drawing serves light, dark
and print. Identifiers are prefixed, so the clip path of one drawing never cuts another. Nothing
in the output depends on the time, the machine's fonts or the user's matplotlib settings.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shearling.report.draw.markup import Markup, el

# stand-in -> CSS variable; near-black, so a forgotten one is seen at once on a dark page
INK, MUTED, LINE, ACCENT, BAR, PAPER = (f"#0{n}0{n}0{n}" for n in range(1, 7))
SERIES = tuple(f"#0{n}0{n}1{n}" for n in range(8))
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", ACCENT: "accent", BAR: "bar"} | {
    PAPER: "paper",
    **{colour: f"series-{n}" for n, colour in enumerate(SERIES)},
}
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's own font
    "svg.hashsalt": "shearling",
    "font.family": "DejaVu Sans",  # comes with matplotlib; used to measure, never named in the page
    "font.size": 12,
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "path.simplify": False,
}
UNITS_PER_INCH = 72  # matplotlib writes one SVG unit a point


def drawing(
    draw: Callable[[Axes, bool], None],
    prefix: str,
    label: str,
    height: int = 260,
    narrow_height: int = 235,
    left: int = 46,
    width: int = 900,
) -> Markup:
    """A plot drawn twice, for a wide page and for a phone; CSS shows the one that fits.

    Args:
        draw: draws into the axes; its second argument says whether the page is narrow.
        prefix: makes the identifiers inside unique on the page.
        label: what a screen reader says instead of the picture.
        height: of the wide version, in CSS pixels at full size; ``narrow_height``: of the other.
        left: of the axes, for the labels beside them, in CSS pixels.
        width: of the wide version; less where several stand side by side.
    """
    return Markup(
        "".join(
            el(
                "div",
                _svg(draw, f"{prefix}-{size[0]}", label, size, left),
                class_=f"plot {size[0]}",
            )
            for size in (("wide", width, height), ("narrow", 345, narrow_height))
        )
    )


def _svg(
    draw: Callable[[Axes, bool], None],
    prefix: str,
    label: str,
    size: tuple[str, int, int],
    left: int,
) -> Markup:
    shape, width, height = size
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        figure = Figure(figsize=(width / UNITS_PER_INCH, height / UNITS_PER_INCH))
        figure.patch.set_visible(False)
        axes = figure.add_axes((left / width, 42 / height, 1 - (left + 8) / width, 1 - 58 / height))
        _plain(axes)
        draw(axes, shape == "narrow")
        target = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(target, format="svg", metadata=nothing)
    return _inline(target.getvalue(), prefix, label)


def _plain(axes: Axes) -> None:
    """Horizontal lines to read values off, a base line, and nothing else."""
    axes.patch.set_visible(False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set(color=MUTED, linewidth=0.8)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, pad=6, labelcolor=MUTED)
    axes.tick_params(axis="x", which="major", length=3, width=0.8, color=MUTED, pad=4)


def _inline(svg: str, prefix: str, label: str) -> Markup:
    """Cut an SVG file down to an element of an HTML page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r' id="([^"]+)"', rf' id="{prefix}-\1"', svg)
    svg = re.sub(r'(?:xlink:)?href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    # the page's font in place of the one that measured
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None, "matplotlib writes a viewBox"
    opening = str(el("svg", role="img", aria_label=label)).removesuffix("></svg>")
    body = re.sub(r"\s*\n\s*", " ", svg[svg.index(">") + 1 :]).strip()
    return Markup(f"{opening} {box.group()}>{body}")
