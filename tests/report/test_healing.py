"""Healing runs in the report: what was logged is what is drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from shearling.errors import ShearlingError
from shearling.report.collect import collect
from shearling.report.healing import lines
from shearling.report.page import page

DOMAINS = ("arxiv", "book", "c4", "cc", "github", "stackexchange", "wiki")


def history(moving: bool) -> dict[str, Any]:
    looks = [
        {
            "tokens": 1000 * look,
            "losses": {name: 3.0 + n / 10 - look / 20 for n, name in enumerate(DOMAINS)},
            "weights": {
                name: 1 / 7 + (n - 3) * look / 500 * moving for n, name in enumerate(DOMAINS)
            },
        }
        for look in range(5)
    ]
    return {
        "kind": "healing", "shearling": "0", "created": "2026-11-22T00:00:00+00:00",
        "model": {"name": "lamb", "fingerprint": "ab" * 32}, "recipe": "distill", "looks": looks,
    }  # fmt: skip


@pytest.mark.parametrize("moving", [False, True])
def test_section(tmp_path: Path, moving: bool) -> None:
    (tmp_path / "healing.json").write_text(json.dumps(history(moving)))
    results = collect([tmp_path])
    (found,) = results.healings
    assert found.tokens == (0, 1000, 2000, 3000, 4000)
    assert found.losses["book"] == pytest.approx((3.1, 3.05, 3.0, 2.95, 2.9))
    html = page(results)
    assert "Healing" in html
    assert "lamb, distill" in html
    assert all(f"</svg>{name}</li>" in html for name in DOMAINS)
    # Losses once; shares only where they moved; each for a wide page and for a narrow one.
    assert html.count('class="plot wide"') == (2 if moving else 1)


def test_lines() -> None:
    values = {name: (3.0, 2.0 + n) for n, name in enumerate(DOMAINS)}
    axes = Figure().add_subplot()
    lines((0, 500), values, "nats")(axes, False)
    drawn = axes.get_lines()
    assert [tuple(line.get_ydata()) for line in drawn] == [tuple(v) for v in values.values()]
    looks = {(line.get_color(), line.get_marker()) for line in drawn}
    assert len(looks) == len(DOMAINS), "no two domains look alike"


def test_no_run_no_section(tmp_path: Path) -> None:
    given = history(False) | {"looks": []}
    (tmp_path / "healing.json").write_text(json.dumps(given))
    assert '<h2 id="healing"' not in page(collect([tmp_path]))


def test_a_history_that_is_damaged(tmp_path: Path) -> None:
    given = history(False)
    given["looks"][2]["losses"].pop("c4")
    (tmp_path / "healing.json").write_text(json.dumps(given))
    with pytest.raises(ShearlingError, match=r"looks\[2\].losses.c4 is missing"):
        collect([tmp_path])
