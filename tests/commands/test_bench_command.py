"""`shearling bench` from the command line, on programs that stand in for llama.cpp's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

import fake_engines
from shearling.commands.bench import ENGINES, bench
from shearling.errors import ShearlingError
from shearling.evaluate.engines import NAMES

app = typer.Typer()
app.command()(bench)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def refused(*arguments: object) -> str:
    found = run(*arguments)
    assert isinstance(found.exception, ShearlingError), found.output
    return str(found.exception)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fake programs, and a converter that writes an empty file."""

    def export(_source: Path, output: Path, *, outtype: str) -> Path:
        output.write_text(outtype)
        return output

    monkeypatch.setenv("SHEARLING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("shearling.ship.gguf.export_gguf", export)
    return fake_engines.llama_cpp(tmp_path / "llama")


def test_a_grid_with_llama_cpp_as_json_and_as_a_file(models, programs, tmp_path):
    file = tmp_path / "bench.json"
    found = run(
        models("llama"), models("llama"), "--engine", "llama.cpp", "--llama-cpp", programs,
        "--batch", "1,2", "--prompt", "4,8", "--new", "3", "--repeats", 2, "--threads", 1,
        "--output", file, "--json",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert json.loads(file.read_text()) == result
    places = [(r["model"]["name"], r["batch"], r["prompt"], r["new"]) for r in result["runs"]]
    assert places == [
        (name, batch, prompt, 3)
        for batch in (1, 2)
        for prompt in (4, 8)
        for name in ("llama", "llama#2")
    ]
    assert len({run["model"]["fingerprint"] for run in result["runs"]}) == 1
    assert {run["engine"] for run in result["runs"]} == {"llama.cpp"}
    assert {run["weights"] for run in result["runs"]} == {"llama-f32.gguf"}
    assert {run["repeats"] for run in result["runs"]} == {2}
    assert result["runs"][0]["ms_per_token"]["median"] == pytest.approx(10)
    assert result["runs"][0]["first_token_ms"]["median"] == pytest.approx(40)
    assert result["runs"][0]["decode_tokens_per_s"]["median"] == pytest.approx(100)
    assert [found["decode_speedup"]["median"] for found in result["ratios"]] == [1.0] * 4
    assert len(fake_engines.notes(programs)) == 2 * 2 * 3 * (2 + 1)


def test_for_people(models, programs):
    found = run(
        models("llama"), models("llama"), "--engine", "llama.cpp", "--llama-cpp", programs,
        "--batch", 1, "--prompt", 4, "--new", 3, "--repeats", 1,
    )  # fmt: skip
    head, first, _, _, ratio = found.stdout.splitlines()
    assert head.split()[:2] == ["model", "engine"]
    assert first.split()[:5] == ["llama", "llama.cpp", "1", "4", "3"]
    assert ratio.startswith("llama#2: 1.00x (1.00-1.00) the decode speed of llama; its FLOPs")


def test_a_dry_run_says_what_would_be_timed_and_runs_nothing(models, programs, tmp_path):
    asked = (
        models("llama"), "--engine", "llama.cpp,transformers", "--llama-cpp", programs,
        "--batch", "1,2", "--prompt", "4,8", "--new", 3, "--repeats", 2, "--dry-run",
        "--output", tmp_path / "bench.json",
    )  # fmt: skip
    planned = json.loads(run(*asked, "--json").stdout)
    [model] = planned["models"]
    assert [one["engine"] for one in planned["engines"]] == ["llama.cpp", "transformers"]
    assert planned["engines"][0]["bytes"] > 4 * model["parameters"]
    assert planned["engines"][1]["bytes"] > planned["engines"][0]["bytes"]
    assert planned["grid"] == [
        {"batch": batch, "prompt": prompt, "new": 3} for batch in (1, 2) for prompt in (4, 8)
    ]
    lines = run(*asked).stdout.splitlines()
    assert lines[0] == f"models: llama ({model['parameters']:,} parameters)"
    assert "12 runs" in lines[1]
    assert lines[3] == "batch 1: 4 prompt tokens, 3 new ones; a warm-up and 2 rounds"
    assert not (tmp_path / "bench.json").exists()
    assert not (programs / "notes").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "transformers,onnx"], "names 'onnx', but transformers, llama.cpp, vllm"),
        (["--batch", "one"], "--batch 'one' was given, but whole numbers"),
        (["--prompt", "1;2"], "--prompt '1;2' was given, but whole numbers"),
        (["--new", "2.5"], "--new '2.5' was given, but whole numbers"),
        (["--prompt", "0"], "--prompt 0 was given, but numbers of at least 1 were expected"),
        (["--prompt", "60", "--new", "5"], "60 tokens and 5 new ones are longer than the 64 pos"),
        (["--prompt", "4", "--new", "4", "--engine", "llama.cpp", "--llama-cpp", "."],
         "llama-bench was looked for in"),
        (["--prompt", "4", "--new", "4", "--engine", "vllm", "--vllm", "nowhere"],
         "vllm was looked for at nowhere"),
        (["--output", "."], "is a directory"),
    ],
)  # fmt: skip
def test_refuses(models, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(models("llama"), *arguments)


def test_engines_are_those_there_are():
    assert ENGINES == NAMES


@pytest.mark.parametrize("option", ["--batch", "--prompt", "--new"])
def test_a_number_below_one_is_refused_before_any_work(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shearling.commands.bench._workload", lambda *_: pytest.fail("work"))
    said = refused("no-model", option, "4,-1")
    assert said.startswith(f"{option} -1 was given, but numbers of at least 1 were expected")
