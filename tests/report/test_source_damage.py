"""The table of held-out damage on each calibration source."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sample_run import SampleRun

from shearling.report.pages.page import page
from shearling.report.pages.source_damage import source_damage
from shearling.report.records.collect import collect

WEB = {"name": "web", "windows": 8, "tokens": 2040, "perplexity_before": 20.0,
       "perplexity_after": 30.0, "divergence": 0.4}  # fmt: skip
CHAT = WEB | {"name": "<chat>", "perplexity_before": 4.0, "perplexity_after": 8.0}


def shown(run: SampleRun, sources: Any) -> str:
    options = {
        "calibration": {"sources": [{"name": "web", "share": 0.5}, {"name": "b", "share": 0.5}]},
        "repair": {"steps": [{"strength": 0.1}], "sources": sources},
    }
    run.write_manifest("pruned", run.pruned, run.kept, options=options)
    return page(collect([run.root]))


@pytest.fixture
def run(tmp_path: Path) -> SampleRun:
    run = SampleRun(tmp_path)
    run.write_all()
    return run


def test_worst_first(run: SampleRun) -> None:
    html = shown(run, [WEB, CHAT])
    assert "&lt;chat&gt;" in html
    text = " ".join(re.sub(r"<[^>]+>", " ", html.replace("\u202f", " ")).split())
    assert text.index("&lt;chat&gt; 2 040 tokens 4.00 8.00 2.00 0.400") < text.index(
        "web 2 040 tokens 20.0 30.0 1.50 0.400"
    )
    assert "calibration sources name web, share 0.500; name b, share 0.500" in text


@pytest.mark.parametrize(
    "sources",
    [None, [], 3, [3], [{"name": "web"}], [WEB | {"perplexity_before": 0}],
     [WEB | {"divergence": "x"}], [WEB | {"perplexity_after": 10**400}]],
)  # fmt: skip
def test_what_is_no_figure_is_left_out(sources: Any) -> None:
    assert source_damage(SimpleNamespace(options={"repair": {"sources": sources}})) is None
    assert source_damage(SimpleNamespace(options={"repair": sources})) is None
