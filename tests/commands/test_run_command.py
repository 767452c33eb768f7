"""``shearling init`` and ``run`` as a user gives them: the plan, JSON, and questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from every_command import Inputs, run
from shearling.commands import init
from shearling.errors import ShearlingError

SMALL = (
    "data.length=24", "data.held_out=0.2", "heal=null", "evaluate=null", "bench=null",
    "method.refit=false", "method.criteria=magnitude",
)  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("recipes"), layers=3)


def test_from_answers_to_a_smaller_model(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "run"
    run("init", "--model", inputs.plain, "--text", inputs.text, "--size", "2 blocks", "--machine",
        "cpu", "--output", recipe)  # fmt: skip
    assert f"run it with `shearling run {recipe} --output DIR`" in capsys.readouterr().out
    with pytest.raises(ShearlingError, match=r"recipe.yaml is there already"):
        run("init", "--output", recipe)
    run("run", recipe, *SMALL, "--output", output, "--dry-run")
    said = capsys.readouterr().out
    assert "03-prune" in said
    assert "to do" in said
    assert not output.exists()
    run("run", recipe, *SMALL, "--output", output, "--dry-run", "--json")
    plan = json.loads(capsys.readouterr().out)
    names = [stage["name"] for stage in plan["stages"]]
    assert names == ["01-pack", "02-text", "03-prune", "04-report"]
    assert all(stage["seconds"] >= 0 for stage in plan["stages"])
    run("run", recipe, *SMALL, "--output", output)
    captured = capsys.readouterr()
    assert "03-prune (3 of 4): " in captured.err
    assert f"model: {output / '03-prune'}" in captured.out
    assert json.loads((output / "03-prune" / "config.json").read_text())["num_hidden_layers"] == 2
    run("run", recipe, *SMALL, "--output", output, "--json")
    result = json.loads(capsys.readouterr().out)
    assert (result["made"], result["kept"]) == ([], names)
    assert [Path(page).name for page in result["pages"]] == ["comparison.html", "report.html"]


def test_what_no_option_says_is_asked(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"model": str(inputs.plain), "text": str(inputs.text), "small": "0.8x",
               "machine": "cpu"}  # fmt: skip
    asked: list[str] = []

    def prompt(question: str, **how: Any) -> str:
        asked.append(next(word for word in answers if word in question))
        return answers[asked[-1]]

    monkeypatch.setattr(typer, "prompt", prompt)
    monkeypatch.setattr(init.sys.stdin, "isatty", lambda: True, raising=False)
    run("init", "--output", tmp_path / "asked.yaml")
    assert asked == ["model", "text", "small", "machine"]
    monkeypatch.setattr(init.sys.stdin, "isatty", lambda: False, raising=False)
    run("init", "--model", inputs.plain, "--text", inputs.text, "--size", "0.8x", "--output",
        tmp_path / "told.yaml")  # fmt: skip
    with pytest.raises(ShearlingError, match="no terminal to ask on, and --size was not given"):
        run("init", "--model", inputs.plain, "--text", inputs.text, "--output", tmp_path / "none")
