"""What is left of the source's abilities, on both pages: worst first, and said in the verdict."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from five_models import FiveModels
from html_page import require_self_contained, require_targets
from sample_run import SampleRun

from shearling.report import collect, page
from shearling.report.decide.candidates import field_of
from shearling.report.decide.choice import choose
from shearling.report.decide.selection import select
from shearling.report.pages.compare_page import compare_page

LOST = {"copying": 0.0, "sums": 0.4, "spelling": 0.04, "counting": 0.1}  # nats a token


def figures(lost: float, *, right: float = 0.5) -> dict[str, Any]:
    """Three items, a nat a token each at first."""
    return {
        "exact": right, "exact_interval": [0.2, 0.8], "nll": 1 + lost, "nll_interval": [0.5, 1.5],
        "tokens": 4.0, "expected_tokens": 3.0, "lengths": [3, 3, 3],
        "losses": [1 + lost * share for share in (0.9, 1.0, 1.1)],
    }  # fmt: skip


def abilities(factor: float, **changes: Any) -> dict[str, Any]:
    asked = {name: figures(factor * lost) for name, lost in LOST.items()}
    writing = {"repetition_4": 0.02 * factor, "tokens": 64.0, "losses": [0.02 * factor]}
    return {
        "seed": 0, "asked_sha256": "ab" * 32, "abilities": asked | {"free writing": writing},
    } | changes  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> SampleRun:
    sample = SampleRun(tmp_path / "run")
    sample.write_all()
    for where, model, factor in (("source", sample.source, 0), ("results", sample.pruned, 1)):
        sample.write(f"{where}/abilities.json", "abilities", model=model, **abilities(factor))
    return sample


def section(text: str) -> str:
    return text.split('id="abilities"')[1].split("</section>")[0]


def test_the_worst_comes_first_and_stands_out(run: SampleRun) -> None:
    text = page(collect([run.root]))
    require_self_contained(text, most_bytes=1_000_000)
    require_targets(text)
    shown = section(text)
    rows = re.findall(r'<th scope="row">(?:<b>)?(.*?)<', shown)
    assert rows == ["sums", "counting", "spelling", "free writing", "copying", "All"]
    low = re.findall(r'<span class="worse"><b>([\d.]+)', shown)
    below = [100 * math.exp(-LOST[name]) for name in ("sums", "counting")]
    mean = 100 * math.exp(-(sum(LOST.values()) + 0.02) / 5)
    assert low == [f"{value:.1f}" for value in (*below, mean)]
    assert "2.0\u202f% of 4-grams repeat" in shown
    assert shown.count("50\u202f% exact") == 8


def test_the_verdict_says_it_in_a_line(run: SampleRun) -> None:
    text = re.sub(r"<[^>]+>", "", page(collect([run.root])).split("<main")[0])
    assert (
        "89.4 % of the source’s abilities are left on average; below 95 % are sums (67.0 %) and "
        "counting (90.5 %)."
    ) in text.replace("\u202f", " ")


def test_nothing_lost_is_said_as_well(run: SampleRun) -> None:
    run.write("results/abilities.json", "abilities", model=run.pruned, **abilities(0.0))
    text = page(collect([run.root]))
    assert "are left on average, and none is below 95" in text
    assert 'class="worse"' not in section(text)


def test_other_items_are_not_compared(run: SampleRun) -> None:
    other = abilities(1.0, asked_sha256="cd" * 32)
    run.write("results/abilities.json", "abilities", model=run.pruned, **other)
    text = page(collect([run.root]))
    assert "abilities are left" not in text
    assert section(text).count("<table>") == 2


def test_without_a_word_on_abilities_there_is_no_section(tmp_path: Path) -> None:
    sample = SampleRun(tmp_path / "bare")
    sample.write_all()
    assert 'id="abilities"' not in page(collect([sample.root]))


def test_compare_decides_by_what_is_left(tmp_path: Path) -> None:
    five = FiveModels(tmp_path)
    five.write_bench()
    for place, factor in enumerate((0.0, 1.0, 0.3, 2.0, 0.0)):
        five.write(f"{place}/abilities.json", "abilities", model=five.models[place],
                   **abilities(factor))  # fmt: skip
    selection = select(five.records(), five.candidates())
    choice = choose(field_of(selection.table), 0.05)
    assert [measure.name for measure in choice.deciding] == ["share of abilities left"]
    left = choice.deciding[0].values[five.models[1]["fingerprint"]]
    assert left.value == pytest.approx(math.exp(-(sum(LOST.values()) + 0.02) / 5))
    assert left.low < left.value < left.high
    assert choice.pick is not None
    assert choice.pick.name == "int8"  # 1.06 bytes a parameter, nothing lost
    text = compare_page(selection, choice)
    require_self_contained(text, most_bytes=1_000_000)
    rows = re.findall(r'<th scope="row">(?:<b>)?(.*?)<', section(text))
    assert rows[0] == "sums"
    head = re.sub(r"<[^>]+>", "", text.split("<main")[0]).replace("\u202f", " ")
    assert "In int8, 100.0 % of the source’s abilities are left on average, and none" in head
