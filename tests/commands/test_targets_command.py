"""Targets from the command line, with a timer that computes what it would have measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from fake_timer import FakeTimer, plain
from shearling.commands.prune import prune
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.model.manifest import read_manifest
from shearling.targets import timing

WEIGHTS = ("--by", "magnitude,magnitude-l2")  # criteria that need no text
app = typer.Typer()
app.command()(prune)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def refused(*arguments: object) -> str:
    found = run(*arguments)
    assert isinstance(found.exception, ShearlingError), found.output
    return str(found.exception)


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every load that something was to be timed under."""
    loads: list[Any] = []

    def timer(source: Checkpoint, load: Any, progress: Any) -> FakeTimer:
        loads.append(load)
        return FakeTimer(source.shape, plain)

    monkeypatch.setattr(timing, "EngineTimer", timer)
    return loads


def test_a_speed_is_met_and_written_down(models, timers, tmp_path: Path) -> None:
    output = tmp_path / "smaller"
    ran = run(
        models("llama"), "--speed", "1.2x", "--by", "magnitude,magnitude-l2", "--output", output,
        "--engine", "vllm", "--batch", 2, "--prompt", 8, "--new", 4, "--threads", 1,
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    source, made = Checkpoint.open(models("llama")), Checkpoint.open(output)
    assert plain(source.shape) / plain(made.shape) >= 1.2
    account = (read_manifest(output) or {})["options"]["targets"]
    assert account["wanted"] == {"speed": "1.2x"}
    assert account["shape"] == dict(made.shape)
    assert account["measured"]["speed"] == pytest.approx(plain(source.shape) / plain(made.shape))
    assert account["measured"]["parameters"] == made.parameters
    assert len(account["table"]) == 4
    assert account["machine"] == FakeTimer.machine
    (load,) = timers
    assert (load.engine, load.batch, load.prompt, load.new, load.threads) == ("vllm", 2, 8, 4, 1)
    assert "planned     1.2" in ran.stdout
    assert re.search(
        r"--prefer balanced: of what goes, whole blocks give \d+% and neurons the rest", ran.stderr
    )


def test_a_dry_run_has_the_table_and_writes_nothing(models, timers, tmp_path: Path) -> None:
    output = tmp_path / "smaller"
    arguments = [models("llama"), "--latency", "9ms", "--params", "0.9x", "--output", output]
    arguments += ["--by", "magnitude,magnitude-l2"]
    told = json.loads(run(*arguments, "--dry-run", "--json").stdout)
    assert told["targets"]["measured"]["seconds_per_token"] <= 0.009 * 1.05
    assert told["targets"]["predicted"].keys() == {"speed", "seconds_per_token"}
    assert told["parameters"] <= 0.9 * told["source_parameters"]
    lines = run(*arguments, "--dry-run").stdout
    assert "a token costs" in lines
    assert "asked       --latency 9ms, --params 0.9x" in lines
    assert not output.exists()


def test_a_footprint_is_kept_by_what_is_written(models, tmp_path: Path) -> None:
    source, output = Checkpoint.open(models("llama")), tmp_path / "smaller"
    cached = 2 * 2 * 3 * 6 * 10  # of ten tokens in 16 bits, a block
    most = 0.8 * (source.bytes + 5 * cached)
    ran = run(
        models("llama"), "--footprint", "0.8x", "--context", 10, "--output", output,
        "--by", "magnitude,magnitude-l2", "--prefer", "quality",
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    made = Checkpoint.open(output)
    assert made.bytes + made.shape["layers"] * cached <= most


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--speed", "0.9x"], "a factor above 1"),
        (["--speed", "1.2x", "--layers", 4], "--speed chooses a shape and --layers names one"),
        ([*WEIGHTS, "--speed", "90x"], "--speed 90x cannot be met.*the nearest"),
        (["--speed", "1.2x", "--engine", "onnx"], "one of transformers, llama.cpp, vllm"),
        (["--footprint", "99GB"], "already"),
        (["--speed", "1.2x", "--params", "0.9x,0.8x"], "--speed chooses one shape.*one size"),
        (["--params", "0.8"], "--params 0.8 was read as a count of parameters.*share.*0.8x"),
        (["--params", "0"], "asks for 0 parameters.*give more"),
        (["--params", "0,8x"], "--params '0,8x' was given, but a comma separates.*as in 0.8x"),
        (["--params", "0.9x,0,8x"], "--params '0.9x,0,8x' was given.*as in 0.8x"),
        (["--params", ","], "--params ',' was given, but a size is missing"),
        (["--params", "0.9x,"], "a size is missing"),
        (["--footprint", "0,7x"], "write 0.7x with a decimal point"),
        (["--speed", "1,3x"], "write 1.3x with a decimal point"),
        (["--params", "0.8x", "--prefer", "size"], "one of quality, balanced, speed"),
        (["--params", "0.8x", "--axes", "layers,vocab"], "--axes vocab.*--calibration"),
    ],
)
def test_what_cannot_be(models, timers, tmp_path: Path, arguments: list, said: str) -> None:
    told = refused(models("llama"), "--output", tmp_path / "out", *arguments)
    assert re.search(said, told), told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--by", "taste"], "taste"),
        (["--calibration", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--by", "influence"], "criterion influence runs the model on text"),
        (["--axes", "mlp", "--by", "flap"], "criterion flap runs the model on text"),
        (["--protect-first", 3, "--protect-last", 2], "leaves none to remove"),
        (["--refit"], "--refit runs the model on text"),
    ],
)
def test_what_is_wrong_elsewhere_is_said_before_anything_is_timed(
    models, timers, tmp_path: Path, arguments: list, said: str
) -> None:
    told = refused(models("llama"), "--output", tmp_path / "out", "--speed", "1.2x", *arguments)
    assert said in told
    assert timers == []


@pytest.mark.parametrize(
    "arguments",
    [
        [*WEIGHTS, "--params", "0.9x", "--axes", "mlp"],  # no block goes
        [*WEIGHTS, "--params", "0.9x", "--prefer", "speed", "--axes", "layers"],
        ["--params", "0.7x", "--by", "flap"],  # refused
    ],
)
def test_a_preference_is_told_only_where_blocks_and_neurons_go(
    models, tmp_path: Path, arguments: list[str]
) -> None:
    ran = run(models("llama"), "--output", tmp_path / "out", "--dry-run", *arguments)
    assert "--prefer" not in ran.stderr


def test_a_preference_is_told_with_figures_of_this_plan(models, tmp_path: Path) -> None:
    asked = (models("llama"), "--output", tmp_path / "out", "--dry-run", *WEIGHTS, "--params")
    one = run(*asked, "0.7x").stderr
    assert re.search(r"--prefer balanced: of what goes, whole blocks give \d+%", one)
    assert "SmolLM2" not in one
    assert re.search(r"0\.7x: --prefer balanced: of what goes", run(*asked, "0.7x,0.5x").stderr)


def test_an_engine_that_is_not_installed(models, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    told = refused(
        models("llama"),
        "--output",
        tmp_path / "out",
        "--speed",
        "1.2x",
        "--engine",
        "llama.cpp",
        *WEIGHTS,
    )
    assert "llama-bench was looked for on the PATH and is not there" in told


def test_a_load_without_a_target_is_said(models, tmp_path: Path) -> None:
    ran = run(
        models("llama"),
        "--output",
        tmp_path / "out",
        "--layers",
        4,
        "--batch",
        8,
        "--dry-run",
        *WEIGHTS,
    )
    assert "--batch ignored: no target of speed" in ran.stderr
