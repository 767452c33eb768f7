"""The comparison page: self-contained, small, escaped, and right about what it says."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from five_models import NAMES, FiveModels
from html_page import Page, require_self_contained, require_targets

from shearling.errors import ShearlingError
from shearling.evaluate.results import TaskResults
from shearling.report import collect, page
from shearling.report.decide.selection import select
from shearling.report.pages.comparison_report import write_comparison
from shearling.report.pages.pareto import labels, shortened
from shearling.report.records.quality import tasks_of


@pytest.fixture
def five(tmp_path: Path) -> FiveModels:
    return FiveModels(tmp_path / "run").write_all()


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page about all five, as they are."""
    return written(FiveModels(tmp_path_factory.mktemp("usual") / "run").write_all())


def written(five: FiveModels, *places: int, within: float = 0.05) -> str:
    output = five.root.parent / "page.html"
    write_comparison(five.records(), five.candidates(*places), output, within=within)
    return output.read_text(encoding="utf-8")


def spaced(text: str) -> str:
    return " ".join(Page(text).text.replace("\u202f", " ").split())


def test_it_loads_nothing_and_is_small(five: FiveModels) -> None:
    text = written(five)
    require_self_contained(text, most_bytes=2_000_000)
    assert str(five.root) not in text


def test_identifiers_are_unique_and_references_lead_somewhere(usual: str) -> None:
    require_targets(usual)


def test_colours_follow_the_page(usual: str) -> None:
    drawings = re.findall(r'<div class="plot.*?</svg>', usual, flags=re.S)
    # two qualities against size and speed, damage and healing, for a wide page and a phone
    assert len(drawings) == 12
    for drawing in drawings:
        assert re.findall(r"#[0-9a-f]{6}\b", drawing) == []


def test_equal_results_make_equal_bytes(five: FiveModels, usual: str) -> None:
    assert written(five) == usual


def test_the_verdict(usual: str) -> None:
    text = spaced(usual)
    assert "Ship int8 : the smallest of 5 models within 5 % of the baseline’s quality" in text
    assert "47.0 % smaller" in text
    assert "at 0.93× the speed" in text
    assert "If speed counts for more than size, ship depth-24-healed : 1.24×" in text
    assert "Fastest is depth-20 , 1.46× the baseline’s decode speed, but with a perplexity" in text
    assert (
        "Nobody should ship depth-24 : depth-24-healed is better, and no larger and no slower."
        in text
    )


def test_every_section_is_there(usual: str) -> None:
    text = usual
    titles = re.findall(r"<h2[^>]*>([^<]+)</h2>", text)
    assert titles == [
        "Trade-offs", "At a glance", "Tasks", "All figures", "Repetition", "Judgements",
        "What was cut", "Damage", "Healing", "Samples", "Lineage", "Load them",
    ]  # fmt: skip
    read = spaced(text)
    for name in NAMES:
        assert name in read
    assert "depth-24 and depth-24-healed , keeps 24 of 30 blocks" in read
    assert "quantised to int8" in read
    assert "8.5" in read  # bits a parameter of it
    assert "vllm serve ./depth-20" in read
    assert "convert SmolLM2-135M and let llama.cpp quantise it" in read


def test_intervals_and_what_exceeds_them(usual: str) -> None:
    text = usual
    value, questions = 0.585, 2376
    around = 196 * math.sqrt(value * (1 - value) / questions)
    assert f"58.5 ± {around:.1f}" in spaced(text)
    marked = re.findall(r'<small class="worse"><b>([^<]+)</b></small>', text)
    assert marked.count("−13.0 points") == 4  # of depth-20: three tasks and their mean
    assert marked.count("−5.2 points") == 3  # within noise on the 500 questions of openbookqa
    assert "−1.1 points" not in marked
    assert "−1.1 points" in text


def test_without_standard_errors_nothing_is_called_more_than_chance(five: FiveModels) -> None:
    for place in range(5):
        five.write_tasks(place, stderr=False)
    text = written(five)
    tasks = text[text.index('id="tasks"') : text.index('id="all-figures"')]
    assert 'class="worse"' not in tasks
    assert " ± " not in re.sub(r"\(± 1.96.*?\)|no ± stands", "", tasks)
    assert "no standard error says whether that is chance" in spaced(text)


def test_one_model(five: FiveModels) -> None:
    text = spaced(written(five, 3))
    assert "depth-20 : one model: there is nothing to compare it with" in text
    assert "Nobody" not in text


def test_a_model_without_any_result(five: FiveModels, tmp_path: Path) -> None:
    shutil.rmtree(five.root / "3")
    bench = json.loads((five.root / "bench.json").read_text())
    bench["runs"] = [run for run in bench["runs"] if run["model"]["name"] != "depth-20"]
    (five.root / "bench.json").write_text(json.dumps(bench))
    text = spaced(written(five))
    assert "Ship int8" in text
    assert "depth-20 was not considered: it has no mean accuracy of 3 tasks and perplexity" in text
    assert "not measured alike" in text


def test_no_result_at_all(tmp_path: Path) -> None:
    five = FiveModels(tmp_path / "run")
    five.root.mkdir()
    text = spaced(written(five))
    assert "No verdict yet" in text
    assert "--text FILE measures perplexity" in text
    assert "--bench measures it" in text
    assert "134.5 M" in text


def test_equal_models(five: FiveModels) -> None:
    """A copy under another fingerprint: neither beats the other."""
    five.candidates()
    for name in ("evaluation-wikitext", "tasks-mine", "degeneration", "generations"):
        values = json.loads((five.root / f"0/{name}.json").read_text())
        values["model"] = five.models[1]
        (five.root / f"1/{name}.json").write_text(json.dumps(values))
    (five.root / "1/shearling.json").unlink()
    (five.root / "2/shearling.json").unlink()
    (five.root / "bench.json").unlink()
    same = replace(five.candidates(1)[0], bytes=five.candidates(0)[0].bytes)
    output = five.root.parent / "page.html"
    choice = write_comparison(five.records(), [*five.candidates(0), same], output)
    assert choice.dominated == {}
    assert choice.pick is choice.field.baseline


def test_what_comes_from_the_data_is_escaped(five: FiveModels, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> & \"quotes\" 'too' $\\frac{$"
    other = FiveModels(tmp_path / "evil", names=(evil, *(f"{evil} {n}" for n in range(4))))
    other.write_all()
    other.write_evaluation(1, text=evil.replace("/", ""))
    text = written(other)
    read = Page(text)
    assert "<script" not in text
    assert "<img" not in text
    assert "script" not in read.tags
    assert evil in read.text


def test_very_long_names(tmp_path: Path) -> None:
    names = tuple(f"{'a-very-long-name-' * 8}{n}" for n in range(5))
    five = FiveModels(tmp_path / "run", names=names).write_all()
    text = written(five)
    for drawing in re.findall(r'<div class="plot.*?</svg>', text, flags=re.S):
        drawn = re.findall(r"<text[^>]*>(…\d|a-very[^<]*)</text>", drawing)
        assert all(len(label) <= 26 for label in drawn)
    assert names[2] in Page(text).text.replace(" ", "")
    assert shortened(names[2], 20) == "a-very-…g-name-2"[:7] + "…" + names[2][-12:]
    assert shortened("short", 20) == "short"
    middle = [f"{'llama-' * 5}{n}{'-healed' * 5}" for n in range(3)]
    assert len(set(labels(middle, 20))) == 3
    assert all(len(label) <= 20 for label in labels(middle, 20))


def test_models_of_several_sources(five: FiveModels, tmp_path: Path) -> None:
    """Which `report` refuses; here each source has its own pictures."""
    manifest = json.loads((five.root / "3/shearling.json").read_text())
    manifest["source"] |= {"name": "Qwen", "fingerprint": "77" * 32}
    (five.root / "3/shearling.json").write_text(json.dumps(manifest))
    with pytest.raises(ShearlingError, match="2 different sources"):
        collect([five.root])
    text = spaced(written(five))
    assert "Of SmolLM2-135M" in text
    assert "Of Qwen" in text


def test_results_of_other_models_are_left_out(five: FiveModels) -> None:
    found = select(five.records(), five.candidates(0, 2))
    known = {five.models[0]["fingerprint"], five.models[2]["fingerprint"]}
    assert {one.model.fingerprint for one in found.table.evaluations} == known
    assert "depth-20" not in spaced(written(five, 0, 2))


def test_a_pruned_baseline_keeps_its_lineage(five: FiveModels) -> None:
    text = spaced(written(five, 1, 2))
    assert "Keep depth-24" not in text
    assert "SmolLM2-135M , source" in text
    assert "keeps 24 of 30 blocks" in text


def test_a_failed_proof_is_never_picked(five: FiveModels) -> None:
    path = five.root / "4/shearling.json"
    manifest = json.loads(path.read_text())
    manifest["proof"] = {"max_abs_difference": 0.7, "passed": False}
    path.write_text(json.dumps(manifest))
    text = spaced(written(five))
    assert "Ship depth-24-healed" in text
    assert "The proof of surgery of int8 failed: do not use it." in text


def test_a_quantised_model_in_a_report(five: FiveModels) -> None:
    """Its proof is that it reads back; nothing was cut, so that nothing waits for repair."""
    for place in ("1", "2", "3"):
        (five.root / place / "shearling.json").unlink()
    whole = page(collect([five.root]))
    text = spaced(whole)
    assert "Its weights were rounded, and read back as what they were in memory." in text
    assert "to repair the cut" not in text
    assert 'class="failed"' not in whole


def test_runs_of_two_engines_stay_apart(five: FiveModels) -> None:
    bench = json.loads((five.root / "bench.json").read_text())
    runs = bench["runs"]
    bench["runs"] = runs + [
        run | {"engine": "llama.cpp", "peak_memory_bytes": None} for run in runs[:2]
    ]
    (five.root / "bench.json").write_text(json.dumps(bench))
    text = spaced(written(five))
    assert "tokens/s, 64 new tokens, with transformers" in text
    assert "tokens/s, 64 new tokens, with llama.cpp" in text


def test_the_report_page_shows_tasks_and_repetition(five: FiveModels) -> None:
    text = page(collect([five.root]))
    titles = re.findall(r"<h2[^>]*>([^<]+)</h2>", text)
    assert {"Tasks", "Repetition", "Judgements"} <= set(titles)
    assert "depth-24-healed over SmolLM2-135M" in spaced(text)


@pytest.mark.parametrize(
    ("metrics", "primary", "expected"),
    [
        ({"acc": 0.5, "acc_stderr": "N/A"}, "acc", ("acc", 0.5, None)),
        ({"acc": 0.5, "acc_norm": 0.6, "acc_norm_stderr": 0.1}, "acc_norm", ("acc_norm", 0.6, 0.1)),
        (
            {"exact_match,strict": 0.2, "exact_match_stderr,strict": 0.01}, "exact_match,strict",
            ("exact_match,strict", 0.2, 0.01),
        ),
        ({"acc": None}, "acc", None),
    ],
)  # fmt: skip
def test_reading_tasks(metrics: dict, primary: str, expected: tuple | None) -> None:
    values = {"kind": "tasks", "model": {"name": "m", "fingerprint": "f"}, "suite": "s"}
    values["tasks"] = {"t": {"metrics": metrics, "primary": primary, "shots": 0}}
    file = Path("tasks.json")
    tasks = tasks_of(TaskResults.from_json(values, file), file).tasks
    assert [(one.metric, one.value, one.stderr) for one in tasks] == (
        [expected] if expected else []
    )


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("0/tasks-mine.json", {"tasks": {"t": 3}}, "t is 3 where an object"),
        ("0/tasks-mine.json", {"suite": 3}, "suite is 3 where a name"),
        ("0/degeneration.json", {"distinct": [1]}, r"distinct is \[1\] where an object"),
        ("judgement.json", {"win_rate": "much"}, "win_rate is 'much' where a number"),
        ("judgement.json", {"interval": [0.1]}, "a list of two numbers"),
    ],
)
def test_a_field_that_is_not_as_it_should_be_is_named(
    five: FiveModels, file: str, change: dict[str, object], message: str
) -> None:
    path = five.root / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ShearlingError, match=message):
        five.records()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_opens_it_without_an_error(tmp_path: Path, usual: str) -> None:
    """On a desk and on a phone: nothing on the console, and nothing wider than the screen."""
    names = tuple(f"{'a-very-long-name-' * 8}{n}" for n in range(5))
    long = written(FiveModels(tmp_path / "run", names=names).write_all())
    frames = [
        f'<iframe style="width:{width}px;border:0" srcdoc="{html.escape(text)}"></iframe>'
        for text in (usual, long)
        for width in (1280, 390)
    ]
    measure = (
        "<script>onload=()=>document.title=[...document.querySelectorAll('iframe')]"
        ".map(f=>f.contentDocument.documentElement.scrollWidth).join(' ')</script>"
    )
    path = tmp_path / "frames.html"
    path.write_text(f"<!doctype html><title></title>{''.join(frames)}{measure}", encoding="utf-8")
    command = [
        "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom", f"file://{path}",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in result.stderr
    widths = re.search(r"<title>([\d ]+)</title>", result.stdout)
    assert widths is not None
    assert widths.group(1) == "1280 390 1280 390"
