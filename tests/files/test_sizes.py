"""Sizes for a person: never "0.0 GB"."""

from __future__ import annotations

import pytest

from shearling.files.sizes import in_bytes, scaled


@pytest.mark.parametrize(
    ("count", "one", "two"),
    [
        (2.5e9, "2.5 GB", "2.50 GB"),
        (61e9, "61.0 GB", "61.00 GB"),
        (9.9e8, "1.0 GB", "0.99 GB"),
        (4.2e8, "420.0 MB", "0.42 GB"),
        (1_234_567, "1.2 MB", "1.23 MB"),
        (9000, "9.0 kB", "9.00 kB"),
        (12, "12 B", "12 B"),
        (0, "0 B", "0 B"),
    ],
)
def test_bytes(count: float, one: str, two: str) -> None:
    assert (in_bytes(count), in_bytes(count, 2)) == (one, two)


def test_operations() -> None:
    assert scaled(0.27e9, "FLOP", 3) == "0.270 GFLOP"
    assert scaled(1.4e6, "FLOP", 3) == "1.400 MFLOP"
