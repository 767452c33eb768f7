"""Sizes and times, in whatever case their units are written."""

from __future__ import annotations

from fractions import Fraction

import pytest

from shearling.commands.options import seconds, size_in_bytes
from shearling.files.amounts import BYTES, amount, with_point
from shearling.pruning.plan import parse_count, parse_params
from shearling.targets.asked import parse_footprint, parse_latency, parse_speed


@pytest.mark.parametrize("text", ["8gb", "8GB", "8 Gb", "8g"])
def test_bytes_are_read_in_any_case(text: str) -> None:
    assert size_in_bytes(text, "--memory") == parse_footprint(text, 10**12) == 8 * 10**9


def test_binary_units() -> None:
    assert size_in_bytes("16gib", "--memory") == parse_footprint("16GIB", 10**12) == 16 * 2**30


def test_other_units_are_read_in_any_case() -> None:
    assert parse_params("0.8X", 100) == parse_params("0.8x", 100) == 80
    assert parse_count("1.5m", "--tokens") == parse_count("1.5M", "--tokens") == 1_500_000
    assert parse_speed("1.3X") == parse_speed("1.3x")
    assert parse_latency("20MS") == parse_latency("20ms") == parse_latency("0.02S")
    assert seconds("2M", "--time") == seconds("2m", "--time") == 120


def test_exactly_a_number_and_a_known_unit() -> None:
    assert amount(" 0.29 x ", ("x",)) == (Fraction(29, 100), "x")
    for text in ("", "x", "1.x", "-1x", "1e3x", "1xx", "1", "٣x"):
        assert amount(text, ("x",)) is None, text
    assert amount("1", BYTES) is None


def test_a_decimal_comma_is_seen() -> None:
    assert [with_point(text) for text in ("0,8x", "1,5 B", "0,8")] == ["0.8x", "1.5 B", "0.8"]
    for text in ("0.9x,0.8x", "900000,800000", "80000000,1M", "0,9x,0"):
        assert with_point(text) is None, text
