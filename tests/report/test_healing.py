"""Healing runs in the report: what was logged is what is drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from shearling.errors import ShearlingError
from shearling.report.pages.healing import Line, lines, mean_loss
from shearling.report.pages.page import page
from shearling.report.records.collect import collect

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
    lines([Line((0, 500), series) for series in values.values()], "nats")(axes, False)
    drawn = axes.get_lines()
    assert [tuple(line.get_ydata()) for line in drawn] == [tuple(v) for v in values.values()]
    looks = {(line.get_color(), line.get_marker()) for line in drawn}
    assert len(looks) == len(DOMAINS), "no two domains look alike"
    assert axes.get_ylim()[0] > 1.5
    again = Figure().add_subplot()
    lines([Line((0, 500), (3.0, 2.0))], "nats", zero=True)(again, False)
    assert again.get_ylim()[0] == 0


def write_run(folder: Path, name: str, **changes: Any) -> None:
    model = {"name": name, "fingerprint": (name[0] * 2) * 32}
    (folder / f"{name}.json").write_text(json.dumps(history(False) | {"model": model} | changes))


def test_several_runs_share_a_drawing(tmp_path: Path) -> None:
    write_run(tmp_path, "lamb", recipe="lora")
    better = history(False)["looks"]
    for look in better:
        look["losses"] = {name: loss - 0.5 for name, loss in look["losses"].items()}
    write_run(tmp_path, "ewe", recipe="cpt", looks=better)
    results = collect([tmp_path])
    means = {results.name_of(one.model.fingerprint): mean_loss(one) for one in results.healings}
    assert means["lamb"] == pytest.approx((3.3, 3.25, 3.2, 3.15, 3.1))
    assert means["ewe"][-1] == pytest.approx(2.6)
    html = page(results)
    assert "2 runs, mean of the domains" in html
    assert html.index("</svg>ewe, cpt</li>") < html.index("</svg>lamb, lora</li>")  # best first
    assert html.count('class="plot wide"') == 3
    assert "by domain</summary>" not in html
    write_run(tmp_path, "ram", recipe="distill")
    assert page(collect([tmp_path])).count("by domain</summary>") == 2


def test_runs_on_other_domains_do_not_share_a_drawing(tmp_path: Path) -> None:
    write_run(tmp_path, "lamb")
    look = {"tokens": 0, "losses": {"hay": 2.0}, "weights": {"hay": 1.0}}
    write_run(tmp_path, "ewe", looks=[look, look | {"tokens": 9}])
    assert "mean of the domains" not in page(collect([tmp_path]))


def test_excess_over_a_reference(tmp_path: Path) -> None:
    write_run(tmp_path, "lamb")
    losses = dict.fromkeys(DOMAINS, 2.5)
    given = {"kind": "reference", "created": "2026", "losses": losses, "how": {"method": "given"}}
    (tmp_path / "reference.json").write_text(json.dumps(given))
    html = page(collect([tmp_path]))
    assert "Excess over the reference loss of each domain (given)." in html
    assert html.count('class="plot wide"') == 2
    losses.pop("c4")  # a reference for other domains is none
    (tmp_path / "reference.json").write_text(json.dumps(given))
    assert "Excess" not in page(collect([tmp_path]))


def test_a_reference_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"kind": "reference", "losses": {"c4": 2.0}}))
    with pytest.raises(ShearlingError, match="reference losses alone"):
        collect([tmp_path])


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
