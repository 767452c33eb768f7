"""What is read, what is passed over, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sample_run import SampleRun

from shearling.errors import ShearlingError
from shearling.report import collect
from shearling.report.records.collect import LARGEST


@pytest.fixture
def run(tmp_path: Path) -> SampleRun:
    """A whole run on SmolLM2-135M, 30 -> 24 blocks."""
    sample = SampleRun(tmp_path / "run")
    sample.write_all()
    return sample


def test_everything_is_joined_by_fingerprint(run: SampleRun) -> None:
    results = collect([run.root])
    assert [model.role for model in results.models] == ["source", "made"]
    assert results.source is not None
    assert results.source.parameters == 134_515_008
    assert results.primary is not None
    assert results.primary.fingerprint == run.pruned["fingerprint"]
    assert results.primary.kept("layers", run.source["fingerprint"]) == tuple(run.kept)
    assert len(results.evaluations) == 4
    assert len(results.runs) == 4


def test_the_same_file_under_two_directories_counts_once(run: SampleRun) -> None:
    assert collect([run.root, run.root / "pruned"]) == collect([run.root])


def test_files_of_others_are_passed_over(run: SampleRun) -> None:
    before = collect([run.root])
    (run.root / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    (run.root / "list.json").write_text("[1, 2]")
    (run.root / "broken.json").write_text("{")
    (run.root / "other.json").write_text('{"kind": "Deployment", "spec": {}}')
    (run.root / "odd.json").write_text('{"kind": ["scores"]}')
    (run.root / "large.json").write_text(" " * (LARGEST + 1))
    (run.root / "link.json").symlink_to(run.root / "nowhere.json")
    partial = run.root / ".pruned.partial-x"
    partial.mkdir()
    (partial / "shearling.json").write_text("{")
    assert collect([run.root]) == before


def test_links_to_directories_are_not_followed(run: SampleRun, tmp_path: Path) -> None:
    elsewhere = SampleRun(tmp_path / "elsewhere")
    elsewhere.source = {"name": "other", "fingerprint": "77" * 32}
    elsewhere.write_scores()
    (run.root / "link").symlink_to(tmp_path / "elsewhere")
    assert len(collect([run.root]).models) == 2


def test_of_two_measurements_the_newer_counts(run: SampleRun) -> None:
    path = run.root / "source/evaluation-encyclopedia.json"
    newer = json.loads(path.read_text()) | {"created": "2027-01-01T00:00:00Z", "perplexity": 30.0}
    (run.root / "a-first.json").write_text(json.dumps(newer))
    found = [
        one.perplexity
        for one in collect([run.root]).evaluations
        if one.text == "encyclopedia" and one.model.fingerprint == run.source["fingerprint"]
    ]
    assert found == [30.0]


def test_a_chain_of_cuts_counts_in_the_first_sources_numbering(run: SampleRun) -> None:
    first = json.loads((run.root / "pruned/shearling.json").read_text())
    twice = {"name": "twice", "fingerprint": "ab" * 32}
    source = {**run.pruned, "shape": run.shape(24), "parameters": 113_274_432}
    keep = [0, 1, 23]
    run.write_manifest("twice", twice, keep, source=source, parent=first, shape=run.shape(3))
    primary = collect([run.root]).primary
    assert primary is not None
    assert [step.model.name for step in primary.chain] == ["SmolLM2-24", "twice"]
    expected = tuple(run.kept[index] for index in keep)
    assert primary.kept("layers", run.source["fingerprint"]) == expected
    assert primary.kept("layers", run.pruned["fingerprint"]) == tuple(keep)
    assert primary.kept("layers", "unknown") is None


def test_a_parent_is_enough_where_its_own_file_is_missing(run: SampleRun) -> None:
    path = run.root / "pruned/shearling.json"
    first = json.loads(path.read_text())
    path.unlink()
    source = {**run.pruned, "shape": run.shape(24), "parameters": 113_274_432}
    healed = {"name": "healed", "fingerprint": "cd" * 32}
    run.write_manifest("h", healed, [], keep={}, stage="heal", source=source, parent=first)
    results = collect([run.root])
    assert results.source is not None
    assert results.source.name == "SmolLM2-135M"
    assert results.primary is not None
    assert results.primary.kept("layers", run.source["fingerprint"]) == tuple(run.kept)


def test_a_model_that_nothing_ties_to_the_source_is_a_reference(run: SampleRun) -> None:
    other = {"name": "other", "fingerprint": "00" * 32}
    run.write_evaluation("other", other, "encyclopedia", 51.3, 16_368)
    assert collect([run.root]).models[-1].role == "reference"


def test_equal_names_are_told_apart(run: SampleRun) -> None:
    same = {"name": "SmolLM2-24", "fingerprint": "ab" * 32}
    run.write_manifest("again", same, run.kept)
    names = [model.name for model in collect([run.root]).models]
    assert names == ["SmolLM2-135M", "SmolLM2-24 (again)", "SmolLM2-24 (pruned)"]


def test_several_sources_are_refused(run: SampleRun, tmp_path: Path) -> None:
    other = SampleRun(tmp_path / "other", source={"name": "Qwen", "fingerprint": "11" * 32})
    other.pruned = {"name": "Qwen-24", "fingerprint": "12" * 32}
    other.write_manifest("pruned", other.pruned, other.kept)
    with pytest.raises(ShearlingError, match="2 different sources, Qwen and SmolLM2-135M"):
        collect([run.root, other.root])


def test_a_directory_without_results_is_refused(run: SampleRun, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ShearlingError, match="empty holds no result"):
        collect([run.root, empty])
    with pytest.raises(ShearlingError, match="is not a directory"):
        collect([tmp_path / "missing"])
    with pytest.raises(ShearlingError, match="No directory"):
        collect([])


def test_a_corrupt_file_of_ours_is_refused(run: SampleRun) -> None:
    path = run.root / "scores-perplexity.json"
    path.write_text(path.read_text()[:200])
    with pytest.raises(ShearlingError, match=r"scores-perplexity\.json is not whole JSON"):
        collect([run.root])


def test_a_corrupt_file_of_ours_is_known_by_its_content(run: SampleRun) -> None:
    (run.root / "renamed.json").write_text('{"kind": "bench", "shearling": "0.1.0", "runs": [')
    with pytest.raises(ShearlingError, match=r"renamed\.json is not whole JSON"):
        collect([run.root])


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("scores-perplexity.json", {"scores": "many"}, "scores is 'many' where a list"),
        ("scores-perplexity.json", {"scores": [1, "2"]}, "a list of numbers was expected"),
        ("scores-perplexity.json", {"model": None}, "model is None where an object"),
        ("source/evaluation-encyclopedia.json", {"nll": True}, "nll is True where a number"),
        ("bench.json", {"runs": [{}]}, r"runs\[0\]\.model is missing where an object"),
        ("damage.json", {"curves": 3}, "curves is 3 where a list"),
        ("pruned/shearling.json", {"keep": {"layers": [31]}}, "below the source's size of 30"),
        ("pruned/shearling.json", {"parameters": -1}, "parameters is -1 where a whole number"),
    ],
)
def test_a_field_that_is_not_as_it_should_be_is_named(
    run: SampleRun, file: str, change: dict[str, object], message: str
) -> None:
    path = run.root / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ShearlingError, match=message):
        collect([run.root])
