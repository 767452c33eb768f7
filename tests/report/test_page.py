"""The page as a whole: self-contained, escaped, deterministic, and honest about what is missing."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from html_page import Page, require_self_contained, require_targets
from sample_run import SampleRun

from shearling.errors import ShearlingError
from shearling.report import collect, page, write_report


@pytest.fixture
def run(tmp_path: Path) -> SampleRun:
    """A whole run on SmolLM2-135M, 30 -> 24 blocks."""
    sample = SampleRun(tmp_path / "run")
    sample.write_all()
    return sample


@pytest.fixture(scope="module")
def whole_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of such a run, drawn once."""
    sample = SampleRun(tmp_path_factory.mktemp("whole") / "run")
    sample.write_all()
    return page(collect([sample.root]))


@pytest.fixture(params=[30, 126])
def any_run(request: pytest.FixtureRequest, tmp_path: Path) -> SampleRun:
    sample = SampleRun(tmp_path / "any", blocks=request.param, cut=request.param // 5)
    sample.write_all()
    return sample


def test_it_loads_nothing_and_is_small(any_run: SampleRun, tmp_path: Path) -> None:
    output = write_report([any_run.root], tmp_path / "report.html")
    text = output.read_text(encoding="utf-8")
    require_self_contained(text, most_bytes=1_000_000)
    assert str(any_run.root) not in text


def test_identifiers_are_unique_and_references_lead_somewhere(any_run: SampleRun) -> None:
    text = page(collect([any_run.root]))
    require_targets(text)
    assert Page(text).tags.count("svg") >= 6


def test_colours_follow_the_page(whole_text: str) -> None:
    drawings = re.findall(r'<div class="plot.*?</svg>', whole_text, flags=re.S)
    assert len(drawings) == 6  # two criteria and one damage curve, for a wide page and a phone
    for drawing in drawings:
        assert re.findall(r"#[0-9a-f]{6}\b", drawing) == []
        assert "var(--accent)" in drawing or "var(--series-0)" in drawing
        assert "DejaVu" not in drawing


def test_equal_results_make_equal_bytes(run: SampleRun, tmp_path: Path) -> None:
    first = write_report([run.root], tmp_path / "a/report.html").read_bytes()
    second = write_report([run.root], tmp_path / "b/report.html").read_bytes()
    assert first == second


def test_the_users_matplotlib_settings_change_nothing(run: SampleRun) -> None:
    import matplotlib

    before = page(collect([run.root]))
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": False}):
        assert page(collect([run.root])) == before


def test_the_headline(run: SampleRun) -> None:
    read = Page(page(collect([run.root])))
    assert "SmolLM2-135M, 30 → 24 blocks" in read.text
    assert "16 % smaller , 1.21× faster decode , perplexity 36 → 93" in read.text.replace(
        "\u202f", " "
    )
    assert "perplexity is 2.60× what it was" in read.text
    assert "the harder hit of 2 texts" in read.text
    assert "Nothing has been done yet to repair the cut." in read.text
    assert "Proof of surgery passed" in read.text


def test_what_comes_from_the_data_is_escaped(run: SampleRun) -> None:
    evil = "<script>alert(1)</script> & \"quotes\" 'too'"
    run.source["name"] = evil
    run.pruned["name"] = f"pruned {evil}"
    run.write_all()
    prompt = {"prompt": evil, "text": "</p></div><img src=x onerror=alert(1)>"}
    run.write(
        "evil.json", "generations", model=run.pruned, sampling=evil, max_new_tokens=3,
        samples=[prompt],
    )  # fmt: skip
    scores = json.loads((run.root / "scores-perplexity.json").read_text())
    scores |= {"criterion": evil, "calibration": {evil: evil}}
    (run.root / "scores-evil.json").write_text(json.dumps(scores))
    damage = json.loads((run.root / "damage.json").read_text())
    damage["curves"][0]["criterion"] = evil
    (run.root / "damage.json").write_text(json.dumps(damage | {"text": evil}))
    run.write_evaluation("evil", run.source, "evil", 36.0, 100)
    changes = {"options": {evil: evil}, "versions": {evil: evil}, "stage": evil}
    run.write_manifest("pruned", run.pruned, run.kept, **changes)
    text = page(collect([run.root]))
    read = Page(text)
    assert "<script" not in text
    assert "<img" not in text
    assert not {"script", "img"} & set(read.tags)
    assert evil in read.text
    assert "</p></div><img src=x onerror=alert(1)>" in read.text


def test_a_dollar_sign_is_no_mathematics(run: SampleRun) -> None:
    damage = json.loads((run.root / "damage.json").read_text())
    damage["curves"][0]["criterion"] = "$\\frac{$ broken"
    (run.root / "damage.json").write_text(json.dumps(damage))
    assert "$\\frac{$ broken" in Page(page(collect([run.root]))).text


@pytest.mark.parametrize(
    ("pattern", "absent", "command"),
    [
        ("scores-*.json", ["scores"], "shearling score"),
        ("damage.json", ["damage"], "shearling demo"),
        ("*/evaluation-*.json", [], "shearling eval"),
        ("bench.json", [], "shearling bench"),
        ("*/generations.json", ["samples"], "shearling eval MODEL --prompt"),
        ("pruned/shearling.json", ["lineage"], "shearling prune"),
    ],
)
def test_what_is_missing_is_said_with_the_command(
    run: SampleRun, whole_text: str, pattern: str, absent: list[str], command: str
) -> None:
    whole = Page(whole_text)
    assert whole.absent == []
    assert command not in whole.text
    for path in run.root.glob(pattern):
        path.unlink()
    read = Page(page(collect([run.root])))
    assert set(absent) <= set(read.absent)
    assert command in read.text


@pytest.mark.parametrize(
    "kind", ["scores", "damage", "evaluation", "bench", "generations", "manifest"]
)
def test_one_kind_alone_makes_a_page(tmp_path: Path, kind: str) -> None:
    alone = SampleRun(tmp_path / "alone")
    {
        "scores": alone.write_scores,
        "damage": alone.write_damage,
        "evaluation": lambda: alone.write_evaluation("r", alone.source, "news", 35.9, 100),
        "bench": alone.write_bench,
        "generations": lambda: alone.write_generations("r", alone.source, 1),
        "manifest": lambda: alone.write_manifest("pruned", alone.pruned, alone.kept),
    }[kind]()
    assert "SmolLM2-135M" in Page(page(collect([alone.root]))).text


def test_models_without_a_manifest_stand_side_by_side(run: SampleRun) -> None:
    (run.root / "pruned/shearling.json").unlink()
    read = Page(page(collect([run.root])))
    assert "no manifest says that one was made of another" in read.text
    assert "2.60×" not in read.text


def test_several_models_are_columns(run: SampleRun) -> None:
    first = json.loads((run.root / "pruned/shearling.json").read_text())
    healed = {"name": "healed", "fingerprint": "ab" * 32}
    source = {**run.pruned, "shape": run.shape(24), "parameters": first["parameters"]}
    run.write_manifest(
        "healed", healed, [], keep={}, stage="heal", source=source, parent=first,
        shape=run.shape(24),
    )  # fmt: skip
    run.write_evaluation("healed", healed, "encyclopedia", 48.2, 16_368)
    run.write_generations("healed", healed, 2)
    text = page(collect([run.root]))
    read = Page(text)
    assert "This is after training." in read.text
    assert "SmolLM2-24 and healed , keeps 24 of 30" in read.text
    assert "1.34×" in read.text
    assert text.count('<th scope="col">') >= 3


def test_a_failed_proof_is_not_hidden(run: SampleRun) -> None:
    proof = {"max_abs_difference": 0.71, "passed": False}
    run.write_manifest("pruned", run.pruned, run.kept, proof=proof)
    read = Page(page(collect([run.root])))
    assert "Proof of surgery failed: logits differ by at most 0.710. Do not use this model." in (
        read.text
    )
    assert "from_pretrained" not in read.text


def test_a_difference_within_the_spread_is_no_gain(run: SampleRun) -> None:
    bench = json.loads((run.root / "bench.json").read_text())
    for one in bench["runs"]:
        one["decode_tokens_per_s"] = {"median": 20.0, "min": 10.0, "max": 30.0}
    bench["runs"][1]["decode_tokens_per_s"]["median"] = 22.0
    (run.root / "bench.json").write_text(json.dumps(bench))
    read = Page(page(collect([run.root])))
    assert "decode at 1.10×, within the spread of its runs" in read.text
    assert "faster" not in read.text


def test_values_that_are_no_numbers_do_not_break_a_plot(run: SampleRun) -> None:
    scores = json.loads((run.root / "scores-perplexity.json").read_text())
    scores["scores"][:4] = [math.inf, math.nan, None, -1.0]
    (run.root / "scores-perplexity.json").write_text(json.dumps(scores))
    flat = scores | {"criterion": "flat", "scores": [0.0] * 30}
    (run.root / "scores-flat.json").write_text(json.dumps(flat))
    damage = json.loads((run.root / "damage.json").read_text())
    damage["curves"][0]["perplexity"][-1] = math.inf
    damage["curves"][1]["perplexity"] = [math.nan] * len(damage["curves"][1]["perplexity"])
    (run.root / "damage.json").write_text(json.dumps(damage))
    text = Page(page(collect([run.root]))).text
    assert "Block 0 runs off the scale, at ∞." in text
    assert "Not a number: 1, 2." in text
    assert "Off every scale in places: block influence, perplexity." in text


def test_names_of_directories_are_quoted_and_paths_are_not_shown(run: SampleRun) -> None:
    options = {"data": "/home/someone/secret/mix", "out": "C:\\Users\\someone\\mix"}
    run.write_manifest("it's mine", run.pruned, run.kept, options=options)
    (run.root / "pruned/shearling.json").unlink()
    text = Page(page(collect([run.root]))).text
    assert 'from_pretrained("it\'s mine"' in text
    assert "someone" not in text


def test_long_generations_are_cut_and_many_prompts_counted(run: SampleRun) -> None:
    samples = [{"prompt": f"prompt {n}", "text": "word " * 4000} for n in range(30)]
    run.write(
        "many.json", "generations", model=run.source, sampling=None, max_new_tokens=None,
        samples=samples,
    )  # fmt: skip
    text = page(collect([run.root]))
    assert len(text.encode()) < 1_000_000
    assert "The first 12 of 32 prompts are shown." in Page(text).text


def test_the_output_appears_whole_or_not_at_all(run: SampleRun, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    output.write_text("the earlier report")
    (run.root / "bench.json").write_text("{")
    with pytest.raises(ShearlingError):
        write_report([run.root], output)
    assert output.read_text() == "the earlier report"
    (run.root / "bench.json").unlink()
    assert write_report([run.root], output) == output
    assert output.read_text().startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["report.html"]
    with pytest.raises(ShearlingError, match="is a directory"):
        write_report([run.root], tmp_path)


def test_scores_of_units_are_shown(run: SampleRun) -> None:
    before = page(collect([run.root]))
    assert "Scores of units" not in before
    rows = [[float(block + unit) for unit in range(5)] for block in range(run.blocks)]
    facts = {"criterion": "flap", "model": run.source, "calibration": {"file": "sheep.txt"}}
    run.write("units.json", "unit-scores", axis="mlp", scores=rows, **facts)
    run.write("channels.json", "unit-scores", axis="hidden", scores=[[1.0, 7.0]], **facts)
    text = page(collect([run.root]))
    require_targets(text)
    section = text[text.index("Scores of units") :]
    assert "Variance x square of its column’s norm, of 5 MLP neurons, in each block." in section
    assert "Calibration: file sheep.txt." in section
    table = re.sub(r">\s+<", "><", section)
    assert '<th scope="row">7</th><td>7.00</td><td>9.00</td><td>11.0</td>' in table
    assert '<th scope="row">all</th><td>1.00</td><td>4.00</td><td>7.00</td>' in table


def test_unit_scores_alone_make_a_page(tmp_path: Path) -> None:
    run = SampleRun(tmp_path)
    facts = {"criterion": "flap", "model": run.source, "axis": "mlp"}
    run.write("units.json", "unit-scores", scores=[[1.0, 2.0]] * 3, **facts)
    results = collect([tmp_path])
    assert results.models[0].shape == {"mlp": 2, "layers": 3}
    assert "Scores of units" in page(results)
    run.write("units.json", "unit-scores", scores=[1.0, 2.0], **facts)
    with pytest.raises(
        ShearlingError, match=r"units.json: scores is .* a list of numbers for each"
    ):
        collect([tmp_path])
