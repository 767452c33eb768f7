import math

import pytest
from matplotlib.figure import Figure

from shearling.evaluate.results import Curve
from shearling.report.draw.plots import Scale, damage_plot, marker_of, scale_of
from shearling.report.draw.vector import SERIES, VARIABLES
from shearling.report.pages.charts import SHAPES, series_key


def test_a_first_block_far_above_all_others_runs_off_the_axis() -> None:
    scale = scale_of([79_812.4, 398.6, *range(37, 100)], baseline=35.9, log_from=3)
    assert scale.off == (0,)
    assert scale.log
    assert scale.low < 35.9
    assert 398.6 < scale.high < 1000


def test_values_close_together_far_from_zero_keep_their_differences() -> None:
    scale = scale_of([37.1, 37.4, 38.0])
    assert not scale.log
    assert scale.low > 30


@pytest.mark.parametrize(
    "values", [[], [0.0, 0.0], [math.nan], [math.inf, 1.0], [-1.0, 2.0], [5.0]]
)
def test_an_axis_always_has_an_extent(values: list[float]) -> None:
    scale = scale_of(values)
    assert math.isfinite(scale.low)
    assert scale.high > scale.low


def test_a_key_shows_what_is_drawn_however_many_there_are() -> None:
    curves = [Curve(f"c{n}", ((), (1,)), (2.0, 3.0 + n)) for n in range(10)]
    axes = Figure().add_subplot()
    damage_plot(curves, (), Scale(1.0, 20.0, True))(axes, False)
    drawn = {float(line.get_ydata()[-1]): line for line in axes.get_lines()}  # ty: ignore[not-subscriptable]
    items = series_key([curve.criterion for curve in curves]).split("</li>")
    looks = set()
    for place, item in zip(range(10), items, strict=False):
        line = drawn[3.0 + place]
        assert f"var(--{VARIABLES[str(line.get_color())]})" in item
        assert SHAPES[str(line.get_marker())] in item
        assert line.get_marker() == marker_of(place)
        looks.add((line.get_color(), line.get_marker()))
    assert len(looks) == 10
    assert len(SERIES) == 8
