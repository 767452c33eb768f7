"""``shearling learn`` as a user runs it, and healing that goes on from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shearling import cli
from shearling.data.store import Store
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint

SHAPE = "layers=2,hidden=20,heads=6,mlp=20"


def run(*arguments: Any) -> None:
    cli.app([str(argument) for argument in arguments], standalone_mode=False)


def learn(model: Checkpoint, store: Store, output: Path, *more: Any, shape: str = SHAPE) -> None:
    run(
        "learn", model.path, "--shape", shape, "--data", store.path, "--tokens", "600", "--output",
        output, "--recipe", "warm", "batch=4", "lr=1e-2", "samples=8", "sample_length=16",
        "eval_every=3", *more,
    )  # fmt: skip


def test_learn_then_heal(
    model: Checkpoint, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learn(model, store, tmp_path / "learned", "mix=dynamic", "update_every=2")
    captured = capsys.readouterr()
    assert "layers=2, hidden=20" in captured.out
    assert "had not settled" in captured.err
    learned = json.loads((tmp_path / "learned" / "shearling.json").read_text())["parent"]
    assert learned["stage"] == "learn"
    run(
        "heal", tmp_path / "learned", "--data", store.path, "--tokens", "200", "--teacher",
        model.path, "mix=dynamic", "batch=4", "--output", tmp_path / "healed",
    )  # fmt: skip
    assert "start with the weights" in capsys.readouterr().err
    healed = json.loads((tmp_path / "healed" / "shearling.json").read_text())
    weights = healed["options"]["weights"]
    assert weights == learned["final_weights"]


def test_the_default_cuts_at_once(model: Checkpoint, store: Store, tmp_path: Path) -> None:
    run(
        "learn", model.path, "--shape", SHAPE, "--data", store.path, "--tokens", "200", "--output",
        tmp_path / "out", "batch=4", "samples=8", "sample_length=16",
    )  # fmt: skip
    manifest = json.loads((tmp_path / "out" / "shearling.json").read_text())
    assert (manifest["stage"], manifest["parent"]["stage"]) == ("heal", "prune")


def test_dry_run(
    model: Checkpoint, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learn(model, store, tmp_path / "out", "--dry-run", "--json")
    plan = json.loads(capsys.readouterr().out)
    assert plan["gates"]["heads"] == {"rows": 9, "units": 3, "target": 2}
    assert plan["parameters"] == model.layout.count(
        model.shape.with_(layers=2, hidden=20, heads=6, mlp=20)
    )
    learn(model, store, tmp_path / "out", "--dry-run")
    assert "mlp: 20 of 50 in each of 3" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_plan_of_a_cut_at_once_is_of_what_is_left(
    model: Checkpoint, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    small = model.layout.count(model.shape.with_(layers=2, hidden=20, heads=6, mlp=20))
    fitted: list[int] = []

    def lines(planning: Any) -> list[str]:
        fitted.append(planning.source.parameters)
        return []

    monkeypatch.setattr("shearling.commands.learn.fitting_lines", lines)
    for recipe, gates, trained in (("scores", False, small), ("warm", True, model.parameters)):
        learn(model, store, tmp_path / "out", "--recipe", recipe, "--dry-run", "--json")
        plan = json.loads(capsys.readouterr().out)
        assert bool(plan["gates"]) is gates
        assert plan["training"]["parameters"] == trained == fitted.pop()
        assert plan["training"]["weights"] == 4 * trained
        assert (plan["source_parameters"], plan["parameters"]) == (model.parameters, small)
    learn(model, store, tmp_path / "out", "--recipe", "scores", "--dry-run")
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"{model.parameters:,} -> {small:,} parameters"


def test_distillation_while_learning(
    model: Checkpoint, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learn(model, store, tmp_path / "out", "--teacher", model.path, "--distil", "--json")
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["parent"]["options"]["recipe"] == "distill"


@pytest.mark.parametrize(
    ("more", "shape", "message"),
    [
        (("--recipe", "shorn"), SHAPE, "scores, warm, sheared"),
        (("--distil",), SHAPE, "--teacher"),
        (("gates=soft",), SHAPE, "gates"),
        ((), "layers=3", "model's own"),
        ((), "layers=9", "layers"),
        ((), "vocab=99", "prune --shape vocab=99"),
        ((), "heads=7", "heads"),
    ],
)
def test_bad_input(
    model: Checkpoint, store: Store, tmp_path: Path, more: tuple[str, ...], shape: str, message: str
) -> None:
    with pytest.raises(ShearlingError, match=message):
        learn(model, store, tmp_path / "out", *more, shape=shape)
    assert not (tmp_path / "out").exists()
