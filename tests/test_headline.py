"""The headline's runs are commands that shearling accepts, at equal tokens, in a sound order."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from shearling.cli import app
from shearling.gates import options as gates
from shearling.train import options as healing

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
GROUP: Any = typer.main.get_command(app)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)

    def imported(name: str) -> ModuleType:
        return __import__(name)

    return imported


def parsed(words: tuple[str, ...]) -> dict[str, Any]:
    """What the command line makes of a command."""
    command = GROUP.commands[words[0]]
    return command.make_context(words[0], [*words[1:], "--output", "NEW"]).params


@pytest.mark.parametrize("reduced", [False, True])
def test_runs_are_commands_with_options_there_are(script: Any, reduced: bool) -> None:
    runs = script("headline_runs")
    scale = runs.REDUCED if reduced else runs.Scale()
    for part in runs.parts(scale).values():
        parsed(part.words)
    for run in runs.runs(scale).values():
        given = parsed(run.heal.words)
        options = healing.parse(given["recipe"], run.heal.tokens, given["settings"])
        assert options.batch * scale.length * options.steps(scale.length) == run.heal.tokens
        assert int(given["tokens"]) == run.heal.tokens
        if run.gates is not None:
            given = parsed(run.gates.words)
            learning = gates.parse(
                given["recipe"], run.gates.tokens, given["settings"], distil=False
            )
            every = learning.eval_every * learning.batch
            assert every == options.eval_every * options.batch, "looks at other places"


@pytest.mark.parametrize("reduced", [False, True])
def test_runs_have_equal_tokens_but_the_one_that_has_a_fifth(script: Any, reduced: bool) -> None:
    runs = script("headline_runs")
    scale = runs.REDUCED if reduced else runs.Scale()
    for name, run in runs.runs(scale).items():
        tokens = scale.tokens // 5 if "-fifth-" in name else scale.tokens
        assert 0 <= tokens - run.calibration - run.tokens < 2 * scale.step
        assert run.part is None or run.calibration == runs.parts(scale)[run.part].tokens


@pytest.fixture
def jobs(script: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, whose processes run the words behind ``shearling`` as they are."""
    module, popen = script("headline_jobs"), subprocess.Popen
    monkeypatch.setattr(
        module.subprocess, "Popen", lambda argv, **options: popen(argv[3:], **options)
    )
    monkeypatch.setattr(module, "SAVING", 4.0)
    monkeypatch.setattr(module, "STARTING", 0.5)
    return module


def job(jobs: ModuleType, folder: Path, name: str, *words: str, needs: tuple[str, ...] = (),
        work: float = 0) -> Any:  # fmt: skip
    """One command; what no other work is for is made for others."""
    done = folder / "done" / name
    step = jobs.Step("healing", words or ("true",), done, done)
    return jobs.Job(name, (step,), needs, work, shared=not work)


def test_jobs_run_in_order_and_what_several_need_once(jobs: Any, tmp_path: Path) -> None:
    ended: list[str] = []
    table = [
        job(jobs, tmp_path, "cut"),
        job(jobs, tmp_path, "unused"),
        job(jobs, tmp_path, "broken", "false"),
        job(jobs, tmp_path, "one", needs=("cut",), work=1),
        job(jobs, tmp_path, "lost", needs=("broken",), work=1),
        job(jobs, tmp_path, "long", needs=("cut",), work=1e9),
        job(jobs, tmp_path, "two", needs=("cut",), work=1),
    ]
    machine = jobs.Machine(tmp_path / "logs", 2, time.perf_counter() + 60, 50, 1e3)
    left = machine.run(table, ended.append)
    assert ended[0] == "cut"
    assert sorted(ended[1:]) == ["one", "two"]
    assert left == ["unused", "broken", "lost", "long"]
    assert set(machine.seconds) == {"cut", "broken", "one", "two"}
    again = jobs.Machine(tmp_path / "logs", 2, time.perf_counter() + 60, 50, 1e3)
    assert again.seconds == machine.seconds
    assert again.run([table[0], table[3]], ended.append) == []
    assert len(ended) == 3, "what is done is not done again"


def test_jobs_are_stopped_in_time(jobs: Any, tmp_path: Path) -> None:
    started = time.perf_counter()
    machine = jobs.Machine(tmp_path / "logs", 1, started + 5.5, 50, 1e3)
    table = [job(jobs, tmp_path, "slow", "sleep", "50", work=1e-9)]
    assert machine.run(table, lambda name: None) == ["slow"]
    assert time.perf_counter() - started < 5, "it was told to stop, and did"
