"""``shearling eval --engine``: which engine answers tasks, as the command line says it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

import fake_engines
from shearling.commands.eval import evaluate
from shearling.errors import ShearlingError
from shearling.evaluate.engines import serving, vllm_server
from tiny_tokenizer import write_llama
from vllm_stand_in import StandIn


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine")
    write_llama(path / "llama", layers=1)
    rows = [{"question": f"{i}?", "choices": ["ram", "ewe"], "label": i % 2} for i in range(4)]
    (path / "flock.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (path / "sheep.txt").write_text("the sheep graze on the hill where the shepherd sits. " * 3)
    return path


@pytest.fixture
def run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("SHEARLING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    app = typer.Typer()
    app.command()(evaluate)

    def command(*arguments: object) -> Result:
        result = CliRunner().invoke(app, [str(one) for one in (place / "llama", *arguments)])
        if isinstance(result.exception, ShearlingError):
            raise result.exception
        assert result.exit_code == 0, result.output + repr(result.exception)
        return result

    return command


def test_tasks_through_vllm_come_first_and_say_so(
    run: Callable[..., Result], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_server, "_ASK_SECONDS", 0.02)
    monkeypatch.setattr(serving, "VllmServer", StandIn)
    program = fake_engines.vllm(tmp_path / "vllm")
    text = ("--text", place / "sheep.txt", "--window", 16, "--max-windows", 1)
    asked = ("--tasks", place / "flock.jsonl", *text, "--engine", "vllm", "--vllm", program)
    assert "flock.jsonl, shots: its own, with vllm 0.32.0" in run(*asked, "--dry-run").stdout
    shown = run(*asked, "--output", tmp_path / "out").stdout.splitlines()
    assert shown[0] == "tasks of custom, with vllm 0.32.0 (± one standard error):"
    assert shown[-1].startswith("perplexity")
    written = json.loads((tmp_path / "out" / "tasks-custom.json").read_text())
    assert (written["engine"], written["engine_version"]) == ("vllm", "0.32.0")
    plain = run("--tasks", place / "flock.jsonl", "--vllm", program)
    assert "tasks of custom (±" in plain.stdout
    assert "--vllm ignored: it is for --engine vllm" in plain.stderr


def test_an_engine_without_tasks_or_without_a_program(
    run: Callable[..., Result], place: Path, tmp_path: Path
) -> None:
    text = ("--text", place / "sheep.txt", "--window", 16, "--max-windows", 1)
    assert "--engine ignored: it is for tasks" in run(*text, "--engine", "vllm").stderr
    with pytest.raises(ShearlingError, match=r"vllm was looked for at .*absent and is not there"):
        run("--tasks", place / "flock.jsonl", "--engine", "vllm", "--vllm", tmp_path / "absent")
