"""The demo, on a tiny model: the default path, its curves and its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shearling.commands import demo_run
from shearling.errors import ShearlingError
from shearling.evaluate.results import Bench, Damage
from shearling.model.checkpoint import Checkpoint
from tiny_tokenizer import write_llama

WORDS = "the shearer shears the sheep on the hill and the wool falls to the floor of the barn"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"{n} {WORDS[n % 9 :]} " * 12}) for n in range(40)]
    file.write_text("\n".join(lines) + "\n")
    return file


def flock(path: Path) -> Path:
    """A tiny model with positions enough for what the demo has it write."""
    model = write_llama(path, layers=5)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    return model


def test_the_default_path_on_a_tiny_model(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Timing has tests of its own, and processes that take seconds to start.
    timed: list[tuple[str, ...]] = []
    bench = Bench(machine={"cpu": "any"}, runs=(), ratios=()).to_json()
    monkeypatch.setattr(
        demo_run,
        "bench_models",
        lambda models, *_, **__: timed.append(tuple(m.name for m in models)) or bench,
    )
    # How much text is taken is no matter here.
    little = demo_run.Amounts(scored=2, repaired=5, measured=2, curves=1, places=2)
    monkeypatch.setattr(demo_run, "QUIET", little)
    monkeypatch.setattr(demo_run, "BUSY", little)
    model, output = flock(tmp_path / "flock"), tmp_path / "demo"
    page = demo_run.run(str(model), text, layers=None, output=output, seed=0)
    html = page.read_text()
    assert html.startswith("<!doctype html>")
    damage = Damage.from_json(json.loads((output / "damage.json").read_text()), output)
    assert {curve.criterion for curve in damage.curves} == set(demo_run.SHALLOW_CRITERIA)
    (pruned,) = (file.parent for file in output.glob("*/shearling.json"))
    manifest = json.loads((pruned / "shearling.json").read_text())
    assert manifest["options"]["repair"]["steps"]
    assert manifest["proof"]["passed"]
    source = Checkpoint.open(model)
    assert Checkpoint.open(pruned).parameters <= 0.8 * source.parameters
    assert timed == [("flock", pruned.name)]
    before = {file: file.stat().st_mtime_ns for file in output.rglob("*.json")}
    assert demo_run.run(str(model), text, layers=None, output=output, seed=0) == page
    assert {file: file.stat().st_mtime_ns for file in before} == before, "it goes on from there"


def test_a_directory_of_another_demo_is_refused(text: Path, tmp_path: Path) -> None:
    model, output = flock(tmp_path / "flock"), tmp_path / "demo"
    output.mkdir()
    (output / "demo.json").write_text(json.dumps({"choices": {}}))
    with pytest.raises(ShearlingError, match="holds a demo with other choices"):
        demo_run.run(str(model), text, layers=None, output=output, seed=0)
