"""Shapes are timed beside their source, on programs that stand in for llama.cpp's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import fake_engines
from shearling.errors import ShearlingError
from shearling.evaluate.engines import Places
from shearling.model.checkpoint import Checkpoint
from shearling.targets import timing
from shearling.targets.asked import TargetLoad
from shearling.targets.timing import EngineTimer


@pytest.fixture
def timer(models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineTimer:
    """A model called slow, which takes twice the time of others."""

    def export(_source: Path, output: Path, *, outtype: str) -> Path:
        output.write_text(outtype)
        return output

    def convert(source: Checkpoint, made: Path, outtype: str, _output: Path) -> None:
        made.write_text(f"{source.shape} {outtype}")

    monkeypatch.setenv("SHEARLING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("shearling.ship.gguf.export_gguf", export)
    monkeypatch.setattr("shearling.ship.converter.convert", convert)
    shutil.copytree(models("llama"), tmp_path / "slow")
    load = TargetLoad(
        engine="llama.cpp", places=Places(fake_engines.llama_cpp(tmp_path / "programs")),
        prompt=4, new=3, repeats=3, threads=1,
    )  # fmt: skip
    return EngineTimer(Checkpoint.open(tmp_path / "slow"), load)


def asked(tmp_path: Path) -> list[str]:
    """Models that the programs were asked to run, in order, by the names of their files."""
    return [
        Path(line[line.index("-m") + 1]).stem for line in fake_engines.notes(tmp_path / "programs")
    ]


def test_shapes_take_turns_with_the_source(timer: EngineTimer, tmp_path: Path) -> None:
    before = timer.source.shape
    shapes = [before.with_(layers=3), before.with_(mlp=32)]
    whole, *others = timer(shapes)
    assert whole.shape == before
    assert whole.seconds == pytest.approx(0.02)
    assert [one.shape for one in others] == shapes
    for one in others:
        assert one.speed == pytest.approx(2)
        assert one.slowest == one.fastest == one.speed
        assert one.seconds == pytest.approx(0.01)
    ran = asked(tmp_path)
    assert len(ran) == 3 * 2 * (1 + 3)  # models, prompt and tokens, a warm-up and three rounds
    assert set(ran) == {"slow-f32", "shape-0", "shape-1"}
    assert timer.machine["engine"] == "llama.cpp"


def test_another_batch_takes_half_the_rounds(timer: EngineTimer, tmp_path: Path) -> None:
    timer([timer.source.shape.with_(layers=3)], batch=8)
    lines = fake_engines.notes(tmp_path / "programs")
    assert {line[0] for line in lines} == {"llama-batched-bench"}
    assert {line[line.index("-npl") + 1] for line in lines} == {"8"}
    assert len(lines) == 2 * (1 + 1)


def test_in_pairs_where_memory_holds_no_more(
    timer: EngineTimer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two_at_most(engine: Any, candidates: list[Any], setting: Any) -> None:
        if len(candidates) > 2:
            raise ShearlingError("too much")

    monkeypatch.setattr(timing, "check_memory", two_at_most)
    before = timer.source.shape
    _, *others = timer([before.with_(layers=3), before.with_(layers=2)])
    assert [one.speed for one in others] == pytest.approx([2, 2])
    assert asked(tmp_path).count("slow-f32") == 2 * 2 * (1 + 3)


def test_a_load_beyond_the_positions(timer: EngineTimer) -> None:
    load = TargetLoad(**{**_fields(timer.load), "prompt": 64})
    with pytest.raises(ShearlingError, match="longer than the 64 positions"):
        EngineTimer(timer.source, load)


def _fields(load: TargetLoad) -> dict[str, Any]:
    return {name: getattr(load, name) for name in load.__dataclass_fields__}
