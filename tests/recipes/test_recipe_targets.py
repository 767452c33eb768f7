"""Targets in recipes: memory is settled when a run is planned, time when its stage is worked on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fake_timer import FakeTimer, plain
from shearling.engine.place import Wish
from shearling.errors import ShearlingError
from shearling.files.progress import silent
from shearling.model.checkpoint import Checkpoint
from shearling.model.manifest import read_manifest
from shearling.pruning.size import Size
from shearling.recipes.schema import TargetSection
from shearling.recipes.target import measured_size, size_of
from shearling.recipes.work import StageWork, prune_model
from shearling.targets import timing
from tiny_farm import Farm


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    def timer(source: Checkpoint, load: Any, progress: Any) -> FakeTimer:
        return FakeTimer(source.shape, plain)

    monkeypatch.setattr(timing, "EngineTimer", timer)


@pytest.fixture
def source(models) -> Checkpoint:
    return Checkpoint.open(models("llama"))


def test_memory_is_settled_when_a_run_is_planned(source: Checkpoint) -> None:
    """Shares are of the recipe's source, whatever is cut."""
    target = TargetSection(footprint="0.7x", context=10, prefer="speed")
    given, after = size_of(target, source, source)
    assert Size(**json.loads(json.dumps(given))).after(source) == after
    cached = 2 * 2 * 3 * 6 * 10
    most = 0.7 * (4 * source.parameters + 5 * cached)
    assert 4 * source.layout.count(after) + after["layers"] * cached <= most
    assert given["account"]["targets"]["prefer"] == "speed"
    _, depth = size_of(target, source, source, depth_only=True)
    assert {axis for axis in depth if depth[axis] != source.shape[axis]} == {"layers"}


def test_time_is_what_operations_promise_until_it_is_measured(source, fake) -> None:
    given, promised = size_of(TargetSection(speed="1.3x", params="0.9x"), source, source)
    given = json.loads(json.dumps(given))
    assert given["targets"]["asked"] == {"speed": "1.3x", "params": int(0.9 * source.parameters)}
    assert promised["layers"] < source.shape["layers"] or promised["mlp"] < source.shape["mlp"]
    size = measured_size(given, source, Wish(device="cpu"), lambda said: None, silent)
    assert plain(source.shape) / plain(size.after(source)) >= 1.3
    assert size.account["targets"]["wanted"]["speed"] == "1.3x"


def test_a_stage_times_and_cuts(source, fake, tmp_path: Path) -> None:
    given, _ = size_of(TargetSection(latency="9ms"), source, source)
    told = {
        "size": given, "criteria": {"by": "magnitude,magnitude-l2"}, "repairs": {},
        "dtype": "auto", "text": {},
    }  # fmt: skip
    prune_model(StageWork(tmp_path / "cut", {"model": (str(source.path),)}, told, device="cpu"))
    options = (read_manifest(tmp_path / "cut") or {})["options"]
    assert options["targets"]["measured"]["seconds_per_token"] <= 0.009 * 1.05


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({"speed": "1.2x", "layers": 4}, "speed chooses a shape and layers names one"),
        ({"prefer": "speed"}, "nothing says how much to cut"),
        ({"engine": "vllm"}, "nothing says how much to cut"),
        ({"speed": "1.2x", "engine": "onnx"}, "engine"),
    ],
)
def test_a_target_that_says_too_much_or_nothing(target: dict, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        TargetSection(**target)


def test_several_cuts_are_not_timed(farm: Farm) -> None:
    steps = '[{"target": {"speed": "1.1x"}}, {"target": {"params": "0.7x"}}]'
    with pytest.raises(ShearlingError, match="a speed or a latency, which one cut"):
        farm.run("steps", "target=null", f"steps={steps}")


def test_an_engine_that_is_not_there_is_said_as_a_run_is_planned(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    with pytest.raises(ShearlingError, match="llama-bench was looked for on the PATH"):
        size_of(TargetSection(speed="1.2x", engine="llama.cpp"), source, source)
