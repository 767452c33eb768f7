import math

import pytest

from shearling.report import numbers

THIN = numbers.THIN


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (35.9, "35.9"),
        (411.2, "411"),
        (79_812.4, f"79{THIN}812"),
        (99.96, "100"),
        (9.996, "10.0"),
        (0.956, "0.956"),
        (0, "0"),
        (-0.25, f"{numbers.MINUS}0.250"),
        (3.1e-6, f"3.1{THIN}×{THIN}10⁻⁶"),
        (math.inf, "∞"),
        (math.nan, "not a number"),
    ],
)
def test_figure(value: float, written: str) -> None:
    assert numbers.figure(value) == written


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (50.0, "50"),
        (0.05, "0.05"),
        (1e4, f"10{THIN}000"),
        (1e6, "10⁶"),
        (3e7, f"3{THIN}×{THIN}10⁷"),
    ],
)
def test_tick(value: float, written: str) -> None:
    assert numbers.tick(value) == written


def test_disk_is_decimal_and_memory_binary() -> None:
    assert numbers.disk(269_060_381) == f"269.1{THIN}MB"
    assert numbers.disk(999_960_000) == f"1.00{THIN}GB"
    assert numbers.memory(826_277_888) == f"788.0{THIN}MiB"
    assert numbers.memory(2**29, beside=2**30) == f"0.50{THIN}GiB"
    assert numbers.disk(12) == f"12{THIN}B"
    assert numbers.count(134_515_008) == f"134.5{THIN}M"


def test_changes_say_nothing_where_there_is_nothing_to_say() -> None:
    assert numbers.percent(134.5, 113.3) == f"{numbers.MINUS}15.8{THIN}%"
    assert numbers.percent(35.9, 93.6) == f"+161{THIN}%"
    assert numbers.percent(10, 10) == f"±0{THIN}%"
    assert numbers.ratio(35.9, 93.6) == "2.61×"
    assert numbers.percent(0, 3) is None
    assert numbers.ratio(math.inf, 3) is None


def test_ranges() -> None:
    assert numbers.ranges([0, 1, 2, 5, 8, 9]) == "0–2, 5, 8, 9"
    assert numbers.ranges([]) == "none"


def test_seconds() -> None:
    assert numbers.seconds(4.21) == f"4.2{THIN}s"
    assert numbers.seconds(421) == f"7{THIN}min 1{THIN}s"
    assert numbers.seconds(7321) == f"2{THIN}h 2{THIN}min"
