import math

import pytest

from shearling.report.plots import scale_of


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
