"""A run that learned what to keep, in the report: its gates, what was cut, and its lineage."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from sample_run import SampleRun

from shearling.errors import ShearlingError
from shearling.report import collect, page
from shearling.report.draw.plots import histogram_plot, sizes_plot, thinned
from shearling.report.pages.units import units_kept

SIZES = {"layers": 5, "hidden": 20, "heads": 6, "kv_heads": 2, "head_dim": 4, "mlp": 12, "vocab": 9}
AFTER = SIZES | {"layers": 3, "hidden": 16, "heads": 4, "mlp": 8}
KEEP = {
    "layers": [0, 2, 4],
    "hidden": [n for n in range(20) if n not in (3, 4, 9, 17)],
    "heads": [[0, 1, 3, 5], [1, 2, 4, 5], [0, 2, 3, 4]],
    "mlp": [[0, 1, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7, 8, 9, 10, 11], [0, 2, 4, 6, 8, 9, 10, 11]],
}
UNITS = {"layers": 5, "hidden": 20, "heads": 3, "mlp": 12}
TARGETS = {"layers": 3, "hidden": 16, "heads": 2, "mlp": 8}
LOST = {"layers": 0.004, "hidden": 0.0191, "heads": 0.131, "mlp": 0.0207}
SOURCE, GATED, LEARNED, HEALED = (
    {"name": name, "fingerprint": letters * 32}
    for name, letters in (("ewe", "aa"), ("ewe-gated", "bb"), ("lamb", "cc"), ("hogget", "dd"))
)


def learning(**changes: Any) -> dict[str, Any]:
    """A file as gates/export.py writes it."""
    steps = [
        {
            "step": step, "tokens": 96 * step, "loss": 3.0,
            "expected": {axis: n - step / 4 for axis, n in UNITS.items()},
            "wanted": {axis: n - step / 5 for axis, n in UNITS.items()},
            "multipliers": {},
        }
        for step in range(1, 6)
    ]  # fmt: skip
    looks = [
        {
            "tokens": 96 * step, "losses": {"fell": 3.0 - step / 9, "pen": 2.0},
            "weights": {"fell": 0.5 + step / 20, "pen": 0.5 - step / 20},
        }
        for step in (0, 5)
    ]  # fmt: skip
    histograms = {axis: [n] + [0] * 18 + [2 * n] for n, axis in enumerate(UNITS, 1)}
    return {
        "kind": "learning", "shearling": "0", "created": "2026-11-22T00:00:00+00:00",
        "model": LEARNED, "gates": "hard-concrete", "source_shape": SIZES, "targets": TARGETS,
        "units": UNITS, "steps": steps, "looks": looks, "histograms": histograms,
        "probability_lost": LOST, "keep": KEEP,
    } | changes  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> SampleRun:
    """A learned model with the file it left, and one healed from it."""
    sample = SampleRun(tmp_path / "run")
    before = {"shape": SIZES, "parameters": 900, "bytes": 3600}
    after = {"shape": AFTER, "parameters": 400, "bytes": 1600}
    gated = before | {
        "kind": "manifest", "stage": "learn", "created": "2026", "model": GATED,
        "source": SOURCE | before, "options": {"recipe": "cpt"}, "probability_lost": LOST,
    }  # fmt: skip
    # The cut is made under a passing name, and of a directory that is called "gated".
    path = sample.write_manifest(
        "lamb", LEARNED | {"name": ".model.partial"}, [], stage="prune", keep=KEEP, options={},
        source=GATED | before | {"name": "gated"}, parent=gated, **after,
    )  # fmt: skip
    (sample.root / "lamb/learning").mkdir()
    (sample.root / "lamb/learning/learning.json").write_text(json.dumps(learning()))
    sample.write_manifest(
        "hogget", HEALED, [], stage="heal", keep={}, proof=None, options={"recipe": "cpt"},
        source=LEARNED | after, parent=json.loads(path.read_text()), **after,
    )  # fmt: skip
    return sample


def text_of(html: str) -> str:
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", html, flags=re.S).split())


def only_learned(run: SampleRun) -> str:
    return page(collect([run.root / "lamb"]))


def test_what_a_file_says(run: SampleRun) -> None:
    (found,) = collect([run.root]).learnings
    assert [axis.axis for axis in found.axes] == list(UNITS)
    heads = found.axes[2]
    assert (heads.units, heads.target, heads.lost) == (3, 2, 0.131)
    assert heads.expected == (2.75, 2.5, 2.25, 2.0, 1.75)
    assert heads.histogram == (3, *[0] * 18, 6)
    assert found.held_out.losses["fell"] == pytest.approx((3.0, 3 - 5 / 9))
    assert found.held_out.tokens == (0, 480)


def test_the_section(run: SampleRun) -> None:
    html = only_learned(run)
    text = text_of(html)
    assert "lamb, hard-concrete gates, 480 tokens" in text
    for title in (
        "Blocks, 5 → 3", "Hidden size, 20 → 16", "Query heads in each group, 3 → 2",
        "MLP neurons in each block, 12 → 8",
    ):  # fmt: skip
        assert title in text
    assert "Blocks: the cut closed 0.4 % of what was open" in text
    assert "Query heads: the cut closed 13 % of what was open" in text
    # What the run itself warns of, and nothing else, is in the colour of costs.
    costs = re.findall(r'<span class="(\w+)">the cut closed', html)
    assert costs == ["muted", "muted", "worse", "worse"]
    # Sizes and histograms of four axes, losses, and shares, which moved.
    assert html.count('class="plot wide"') == 4 + 4 + 2
    assert "Held-out text" in text
    assert "multiplier" not in text


def test_sizes_drawn() -> None:
    axes = Figure().add_subplot()
    sizes_plot((1, 2, 3), (9.0, 7.5, 6.1), (9.0, 7.0, 6.0), 6, 10)(axes, False)
    wanted, expected, target = axes.get_lines()
    assert [list(line.get_xdata()) for line in (wanted, expected)] == [[1, 2, 3]] * 2
    assert list(wanted.get_ydata()) == [9.0, 7.0, 6.0]
    assert list(expected.get_ydata()) == [9.0, 7.5, 6.1]
    assert set(target.get_ydata()) == {6}
    low, high = axes.get_ylim()
    assert low < 6 < 10 < high


def test_histogram_drawn() -> None:
    axes = Figure().add_subplot()
    counts = (4, 0, 0, 1, 7)
    histogram_plot(counts, "P(open)")(axes, False)
    (bars,) = [patch for patch in axes.patches if isinstance(patch, PathPatch)]
    corners = np.asarray(bars.get_path().vertices).reshape(-1, 5, 2)
    drawn = {round(bar[:, 0].mean() + 1e-9): bar[:, 1].max() for bar in corners[:, 1:4]}
    assert drawn == {place: count for place, count in enumerate(counts) if count}
    left, middle, right = axes.get_xticks()
    assert (left, middle, right) == (-0.5, 2.0, 4.5)
    assert axes.get_xlim()[0] < left


def test_a_long_run_is_thinned() -> None:
    assert thinned(3) == [0, 1, 2]
    found = thinned(10_000, most=5)
    assert found == [0, 2500, 5000, 7499, 9999]


def rows_of(html: str) -> list[tuple[int, list[int], list[int]]]:
    """Of every block in the picture: its number, heads kept, heads removed."""
    (rows,) = re.findall(r'<ol class="rows".*?</ol>', html, flags=re.S)
    found = []
    for row in re.findall(r"<li.*?</li>", rows, flags=re.S):
        number = re.search(r">(\d+)</span>", row)
        assert number
        heads: dict[str, list[int]] = {"kept": [], "gone": []}
        for places, name in re.findall(r'd="(.*?)" class="(\w+)"', row):
            # 12 a head, and 6 more between the two groups of three
            heads[name] = [
                (at - at // 42 * 6) // 12 for at in map(int, re.findall(r"M(\d+)", places))
            ]
        found.append((int(number[1]), heads["kept"], heads["gone"]))
    return found


@pytest.mark.parametrize("which", ["lamb", "."])
def test_the_picture_shows_what_was_cut(run: SampleRun, which: str) -> None:
    """In the source's numbering, for the learned model and for one healed from it."""
    html = page(collect([run.root / which]))
    kept = dict(zip(KEEP["layers"], KEEP["heads"], strict=True))
    whole = set(range(6))
    assert rows_of(html) == [
        (n, kept.get(n, []), sorted(whole - set(kept.get(n, [])))) for n in range(5)
    ]
    assert html.count('class="block gone"') == 2
    assert "in 2 groups of one key/value head" in html
    (channels,) = re.findall(r'<path d="([^"]*)" class="lost" opacity="1"', html)
    assert re.findall(r"M(\d+) 0h(\d+)", channels) == [("3", "2"), ("9", "1"), ("17", "1")]
    assert "16 of 20 kept, the same ones in every block" in html
    (rows,) = re.findall(r'<ol class="rows".*?</ol>', html, flags=re.S)
    assert re.findall(r"width:([\d.]+)%", rows) == ["66.67"] * 3


def test_many_channels_are_shown_in_stretches(run: SampleRun) -> None:
    path = run.root / "lamb/shearling.json"
    manifest = json.loads(path.read_text())
    for shape in (manifest["source"]["shape"], manifest["parent"]["shape"],
                  manifest["parent"]["source"]["shape"]):  # fmt: skip
        shape["hidden"] = 576
    manifest["keep"]["hidden"] = [n for n in range(576) if n not in (4, 5, 11)]
    manifest["shape"]["hidden"] = 573
    path.write_text(json.dumps(manifest))
    html = only_learned(run)
    found = re.findall(r'<path d="M(\d+) [^"]*" class="lost" opacity="([\d.]+)"', html)
    assert found == [("2", "1"), ("5", "0.5")]


def test_indices_lead_back_through_two_cuts(run: SampleRun) -> None:
    """Blocks and heads that a second cut leaves are numbered as in the source."""
    parent = json.loads((run.root / "lamb/shearling.json").read_text())
    shape = AFTER | {"layers": 2, "heads": 2}
    run.write_manifest(
        "wether", {"name": "wether", "fingerprint": "ee" * 32}, [], shape=shape, parameters=200,
        keep={"layers": [1, 2], "heads": [[0, 3], [1, 2]]}, parent=parent,
        source=LEARNED | {"shape": AFTER, "parameters": 400, "bytes": 1600},
    )  # fmt: skip
    results = collect([run.root])
    model, source = results.primary, results.source
    assert model is not None
    assert source is not None
    assert model.name == "wether"
    assert model.kept_in_blocks("heads", SOURCE["fingerprint"]) == {2: (1, 5), 4: (2, 3)}
    assert model.kept_in_blocks("heads", LEARNED["fingerprint"]) == {1: (0, 3), 2: (1, 2)}
    assert model.kept_in_blocks("heads", "unknown") is None
    lamb = next(one for one in results.made if one.name == "lamb")
    assert units_kept(source, model) != units_kept(source, lamb)
    # The smallest is unfolded; the others' heads are a click away.
    assert page(results).count("<summary>Which heads and channels</summary>") == 1


def test_a_cut_that_does_not_say_which(run: SampleRun) -> None:
    path = run.root / "lamb/shearling.json"
    manifest = json.loads(path.read_text())
    del manifest["keep"]["heads"]
    path.write_text(json.dumps(manifest))
    html = only_learned(run)
    assert '<ol class="rows"' not in html
    assert "6 of 9" not in html
    assert "4 of 6" in html


def test_the_headline(run: SampleRun) -> None:
    learned = text_of(only_learned(run))
    assert "ewe, 5 → 3 blocks, hidden 20 → 16, 2 more widths" in learned
    assert "This is after learning what to keep." in learned
    assert "from the trained model run without the removed parts." in learned
    assert "Its weights were trained since" not in learned
    assert ".model.partial" not in learned
    healed = text_of(page(collect([run.root])))
    assert "This is after learning what to keep and training." in healed
    assert "from the trained model run without the removed parts. Its weights were" in healed
    assert ".model.partial" not in healed
    assert "lamb and hogget , keeps 3 of 5 blocks, narrower" in healed


def test_the_lineage(run: SampleRun) -> None:
    """Source, gated model, cut and healed one, also where only the last one's file is there."""
    (run.root / "lamb/shearling.json").unlink()
    (run.root / "lamb/learning/learning.json").unlink()
    html = page(collect([run.root / "hogget"]))
    names = re.findall(r'<h3>(\w[\w-]*)<span class="muted">, (\w+)</span></h3>', html)
    assert names == [
        ("ewe", "source"),
        ("ewe-gated", "learn"),
        ("lamb", "prune"),
        ("hogget", "heal"),
    ]
    text = text_of(html)
    assert "Unsettled the cut closes of what was open: Blocks 0.4%, Hidden size 1.9%" in text
    assert text.count("Proof passed") == 1
    assert "none recorded" not in text  # of the steps that only trained
    assert "Learning" not in text


def test_multipliers_are_in_the_numbers(run: SampleRun) -> None:
    given = learning()
    for step in given["steps"]:
        step["multipliers"] = dict.fromkeys(UNITS, -0.25 * step["step"])
    (run.root / "lamb/learning/learning.json").write_text(json.dumps(given))
    text = text_of(only_learned(run))
    assert "multiplier" in text
    assert "−1.25" in text


def test_a_run_without_looks_or_steps(run: SampleRun) -> None:
    path = run.root / "lamb/learning/learning.json"
    path.write_text(json.dumps(learning(steps=[], looks=[])))
    text = text_of(only_learned(run))
    assert "Where they ended" in text
    assert "How many are open" not in text
    assert "Held-out text" not in text


def test_a_learning_file_alone_makes_a_page(tmp_path: Path) -> None:
    (tmp_path / "l.json").write_text(json.dumps(learning()))
    assert "lamb, hard-concrete gates" in text_of(page(collect([tmp_path])))


def changed(*keys: str | int, value: Any = None) -> Callable[[dict[str, Any]], None]:
    """Set a field inside, or drop it."""

    def change(given: Any) -> None:
        for key in keys[:-1]:
            given = given[key]
        if value is None:
            del given[keys[-1]]
        else:
            given[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed("model"), "model is missing"),
        (changed("gates", value=3), "gates is 3 where a text"),
        (changed("targets"), "targets is missing"),
        (changed("targets", "mlp", value=13), r"targets.mlp is 13 where one of 1 to 12 units"),
        (changed("units", "heads"), r"units.heads is missing"),
        (changed("steps", 3, "expected", "layers"), r"steps\[3\].expected.layers is missing"),
        (changed("steps", value={"step": 1}), "steps is .* where a list"),
        (changed("looks", 1, "losses", "pen"), r"looks\[1\].losses.pen is missing"),
        (changed("histograms", "hidden", value=[1, -2]), "histograms.hidden .* a list of counts"),
        (changed("probability_lost", "mlp", value="some"), "probability_lost.mlp is 'some'"),
        (changed("source_shape", "mlp", value=1.5), "source_shape.mlp is 1.5"),
    ],
)  # fmt: skip
def test_a_file_that_is_damaged(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    given = json.loads(json.dumps(learning()))
    change(given)
    (tmp_path / "learning.json").write_text(json.dumps(given))
    with pytest.raises(ShearlingError, match=f"learning.json: {said}"):
        collect([tmp_path])


def test_half_a_file_is_refused(tmp_path: Path) -> None:
    whole = json.dumps(learning())
    (tmp_path / "learning.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(ShearlingError, match="not whole JSON"):
        collect([tmp_path])


@pytest.mark.parametrize(
    ("heads", "said"),
    [
        ([[0, 1, 3, 5]], "keep.heads is .* a list for each of 3 blocks"),
        ([[0, 1], [2, 6], [3, 4]], r"keep.heads\[1\] is \[2, 6\] where indices below"),
        ([[0, 1], 2, [3, 4]], r"keep.heads\[1\] is 2 where a list"),
    ],
)
def test_units_that_a_manifest_cannot_mean(run: SampleRun, heads: Any, said: str) -> None:
    path = run.root / "lamb/shearling.json"
    manifest = json.loads(path.read_text())
    manifest["keep"]["heads"] = heads
    path.write_text(json.dumps(manifest))
    with pytest.raises(ShearlingError, match=said):
        collect([run.root / "lamb"])
