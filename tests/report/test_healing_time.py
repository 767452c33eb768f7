"""What newer histories of healing hold besides: time, and the references of the mix."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from shearling.errors import ShearlingError
from shearling.report.pages import healing
from shearling.report.pages.page import page
from shearling.report.records.collect import collect


def write(folder: Path, name: str, seconds: Sequence[float] = (), **changes: Any) -> None:
    """A run of three looks at two domains."""
    looks = [
        {
            "tokens": 1000 * n, "losses": {"fell": 3.0 - n / 4, "pen": 2.0 - n / 8},
            "weights": {"fell": 0.5, "pen": 0.5}, **({"seconds": seconds[n]} if seconds else {}),
        }
        for n in range(3)
    ]  # fmt: skip
    values = {
        "kind": "healing", "shearling": "0", "created": "2026-11-22T00:00:00+00:00",
        "model": {"name": name, "fingerprint": name[0] * 64}, "recipe": "cpt", "looks": looks,
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(values | changes))


@pytest.mark.parametrize(
    ("last", "unit", "size"), [(90, "seconds", 1), (120, "minutes", 60), (7200, "hours", 3600)]
)
def test_several_runs_over_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: float, unit: str, size: int
) -> None:
    write(tmp_path, "lamb", (0, last / 2, last))
    write(tmp_path, "ewe", (0, 10, 20))
    drawn = []

    def lines(of: Sequence[healing.Line], unit: str, **more: Any) -> Any:
        drawn.append((of, more.get("over")))
        return lambda axes, narrow: None

    monkeypatch.setattr(healing, "lines", lines)
    html = page(collect([tmp_path]))
    (found,) = [of for of, over in drawn if over == f"{unit} of training"]
    at = sorted(tuple(line.at) for line in found)
    assert at == sorted([(0, last / 2 / size, last / size), (0, 10 / size, 20 / size)])
    assert all(tuple(line.values) == pytest.approx((2.5, 2.3125, 2.125)) for line in found)
    assert re.search(r"ewe, cpt, 2.00\s?K tokens in 20.0\s?s", html)


def test_a_run_without_times_has_none(tmp_path: Path) -> None:
    write(tmp_path, "lamb", (0, 5, 10))
    write(tmp_path, "ewe")
    html = page(collect([tmp_path]))
    assert "2 runs, mean of the domains" in html
    assert "of training" not in html
    assert "time</th>" not in html


def test_references_of_the_run_come_before_those_of_a_file(tmp_path: Path) -> None:
    values = {"fell": 2.25, "pen": 1.5}
    given = {"kind": "reference", "losses": {"fell": 1.0, "pen": 1.0}, "how": {"method": "given"}}
    (tmp_path / "reference.json").write_text(json.dumps(given))
    write(tmp_path, "lamb", reference=values)
    html = page(collect([tmp_path]))
    assert "reference loss of each domain (which its mix followed)." in html
    assert "<td>2.25</td>" in html
    write(tmp_path, "lamb", reference=None)
    assert "reference loss of each domain (given)." in page(collect([tmp_path]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reference": {"fell": "low"}}, "reference.fell is 'low'"),
        ({"reference": [1, 2]}, "reference is .* where an object"),
    ],
)
def test_damaged_references(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    write(tmp_path, "lamb", **changes)
    with pytest.raises(ShearlingError, match=said):
        collect([tmp_path])


def test_a_look_without_its_time(tmp_path: Path) -> None:
    write(tmp_path, "lamb", (0, 5, 10))
    values = json.loads((tmp_path / "lamb.json").read_text())
    del values["looks"][1]["seconds"]
    (tmp_path / "lamb.json").write_text(json.dumps(values))
    with pytest.raises(ShearlingError, match=r"looks\[1\].seconds is missing"):
        collect([tmp_path])
