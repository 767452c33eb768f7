"""Learning what to keep, from start to cut model: exact shapes, resume, two processes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from process_work import learn_rank
from processes import ended, started
from shearling.data.store import Store
from shearling.errors import ShearlingError
from shearling.gates.learn import learn
from shearling.gates.options import LearnOptions, parse
from shearling.model.checkpoint import Checkpoint
from shearling.train.log import read

STEPS, BATCH = 8, 4
SIZES = {"layers": 2, "hidden": 20, "mlp": 20, "heads": 6}


def options(**changed: Any) -> LearnOptions:
    values = {
        "tokens": STEPS * BATCH * 24, "batch": BATCH, "micro": 2, "lr": 1e-2, "save_every": 3,
        "eval_every": 4, "eval_sequences": 2, "samples": 8, "sample_length": 16, "rise": 0.5,
    }  # fmt: skip
    return LearnOptions.model_validate(values | changed)


def log(output: Path) -> list[dict[str, Any]]:
    timed = ("seconds", "tokens_per_s", "resumed")
    return [
        {key: value for key, value in record.items() if key not in timed}
        for record in read(output / "learning" / "gates")
    ]


@pytest.fixture(scope="module")
def whole(
    model: Checkpoint, store: Store, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Options -> what a run makes that nothing disturbs; made once, and only to be read."""
    made: dict[str, Path] = {}

    def run(**changed: Any) -> Path:
        given = options(**changed)
        key = given.model_dump_json()
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole") / "out"
            after = model.shape.with_(**SIZES)
            learned = learn(model, after, store, given, made[key])
            assert learned.model is not None
            assert learned.model.shape == after
        return made[key]

    return run


COLD = {"warm_start": False, "refit": False}


@pytest.mark.parametrize(
    "changed", [{}, {"gates": "top-k"}, {"gates": "scores"}, COLD],
    ids=["warm", "top-k", "scores", "cold"],
)  # fmt: skip
def test_the_result_has_exactly_the_shape(
    model: Checkpoint, whole: Callable[..., Path], changed: dict[str, Any]
) -> None:
    after, output = model.shape.with_(**SIZES), whole(**changed)
    assert Checkpoint.open(output).shape == after
    stock = AutoModelForCausalLM.from_pretrained(output)
    assert sum(p.numel() for p in stock.parameters()) == model.layout.count(after)
    manifest = json.loads((output / "shearling.json").read_text())
    assert manifest["parent"]["stage"] in ("learn", "prune")
    assert not (output / "learning" / "gated").exists()


def test_gates_move_towards_the_target(whole: Callable[..., Path]) -> None:
    """By projection, at every step."""
    trained = [r["gates"] for r in log(whole(**COLD)) if r["kind"] == "train"]
    for record in trained:
        for axis, wanted in record["wanted"].items():
            assert record["expected"][axis] == pytest.approx(wanted, rel=1e-4), axis
    assert trained[-1]["wanted"] == pytest.approx(
        {"layers": 2, "hidden": 20, "mlp": 20, "heads": 2}
    )


@pytest.mark.parametrize(
    "changed", [{}, {"constraint": "lagrangian"}, {"gates": "top-k"}],
    ids=["projection", "lagrangian", "top-k"],
)  # fmt: skip
def test_stopped_and_taken_up_again(
    model: Checkpoint, store: Store, whole: Callable[..., Path], tmp_path: Path,
    changed: dict[str, Any],
) -> None:  # fmt: skip
    """By an exception that leaves what a kill would: the same losses and gates, bit for bit."""
    after, given = model.shape.with_(**SIZES), options(**changed)

    def fail(stage: str, done: float, total: float, /) -> None:
        if stage == "training" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(model, after, store, given, tmp_path / "parts", progress=fail)
    learn(model, after, store, given, tmp_path / "parts")
    assert log(tmp_path / "parts") == log(whole(**changed))
    files = [out / "model.safetensors" for out in (tmp_path / "parts", whole(**changed))]
    assert files[0].read_bytes() == files[1].read_bytes()


def two_processes(model: Checkpoint, store: Store, output: Path, *, stop: int = -1) -> list[int]:
    said = output.with_suffix(".said")
    running = started(
        learn_rank, model.path, SIZES, store.path, output, options().model_dump_json(), stop,
        ranks=2, said=said,
    )  # fmt: skip
    return ended(running, said, fails=stop >= 0)


def test_two_processes_are_one(
    model: Checkpoint, store: Store, whole: Callable[..., Path], tmp_path: Path
) -> None:
    """FSDP2 on two gloo processes: one process' gates and losses; killed and gone on with."""
    two_processes(model, store, tmp_path / "two")
    one, two = log(whole()), log(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        if a["kind"] == "train":
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
            for axis, value in a["gates"]["expected"].items():
                assert b["gates"]["expected"][axis] == pytest.approx(value, rel=1e-5)
    keeps = [
        json.loads((output / "shearling.json").read_text())["keep"]
        for output in (whole(), tmp_path / "two")
    ]
    assert keeps[0] == keeps[1]
    assert any(two_processes(model, store, tmp_path / "parts", stop=5))
    assert not (tmp_path / "parts" / "config.json").exists()
    two_processes(model, store, tmp_path / "parts")
    assert log(tmp_path / "parts") == two
    files = [tmp_path / name / "model.safetensors" for name in ("parts", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("sizes", "changed", "message"),
    [
        ({}, {}, "nothing|own"),
        ({"mlp": 10**6}, {}, "mlp"),
        ({"vocab": 20}, {}, "prune --shape vocab=20"),
        ({"mlp": 20}, {"sample_length": 1000}, "sample_length=1000"),
    ],
)
def test_what_is_refused(
    model: Checkpoint, store: Store, tmp_path: Path, sizes: dict[str, int],
    changed: dict[str, Any], message: str,
) -> None:  # fmt: skip
    with pytest.raises(ShearlingError, match=message):
        learn(model, model.shape.with_(**sizes), store, options(**changed), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_multipliers_that_run_away(model: Checkpoint, store: Store, tmp_path: Path) -> None:
    with pytest.raises(ShearlingError, match="multiplier_lr"):
        learn(
            model, model.shape.with_(mlp=20), store,
            options(multiplier_lr=1e6, constraint="lagrangian"), tmp_path / "out",
        )  # fmt: skip


def test_the_paper_s_recipe() -> None:
    found = parse("sheared", 1000, ["seed=4"], distil=False)
    assert (found.warm_start, found.refit, found.mix, found.seed) == (False, False, "dynamic", 4)
    with pytest.raises(ShearlingError, match="scores, warm, sheared"):
        parse("shorn", 1000, [], distil=False)
    with pytest.raises(ShearlingError, match="option of learning"):
        parse("warm", 1000, ["depth=2"], distil=False)
    assert math.isclose(found.rise, 0.2)


def test_options_are_those_of_healing_too() -> None:
    assert torch.equal(torch.tensor(options().lr), torch.tensor(options().healing().lr))


@pytest.mark.parametrize("gates", ["hard-concrete", "scores"])
def test_what_other_options_began_with_is_made_anew(
    model: Checkpoint, store: Store, tmp_path: Path, gates: str
) -> None:
    """Killed before its first checkpoint, and called again with another seed of the text."""
    after = model.shape.with_(**SIZES)

    def stop(stage: str, done: float, total: float, /) -> None:
        if stage == "training":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(model, after, store, options(gates=gates), tmp_path / "out", progress=stop)
    told: list[str] = []
    other = options(gates=gates, seed=3)
    learn(model, after, store, other, tmp_path / "out", notify=told.append)
    assert sum("is of a run with other options, and is made anew" in line for line in told) == 1
    learn(model, after, store, other, tmp_path / "whole")
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("out", "whole")]
    assert weights[0] == weights[1]


def emptied(kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {axis: a for axis, a in kept.items() if axis != "mlp"}


def narrower(kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return kept | {"mlp": kept["mlp"][:, 1:].contiguous()}


def no_numbers(kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return kept | {"mlp": kept["mlp"] * torch.nan}


@pytest.mark.parametrize(
    ("damage", "said"),
    [(emptied, "'mlp'"), (narrower, "mlp is of"), (no_numbers, "finite numbers"), (None, "read")],
)
def test_where_gates_began_is_read_with_care(
    model: Checkpoint, store: Store, tmp_path: Path, damage: Any, said: str
) -> None:
    """Stopped after a checkpoint, and the file damaged by hand, its digest kept."""
    after = model.shape.with_(**SIZES)

    def stop(stage: str, done: float, total: float, /) -> None:
        if stage == "training" and done == 4:
            raise KeyboardInterrupt

    given = options(warm_start=False, refit=False)
    with pytest.raises(KeyboardInterrupt):
        learn(model, after, store, given, tmp_path / "out", progress=stop)
    file = tmp_path / "out" / "learning" / "start.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    if damage is None:
        file.write_bytes(file.read_bytes()[:-9])
    else:
        save_file(damage(load_file(file)), file, metadata=metadata)
    with pytest.raises(ShearlingError, match=f"where gates began, is damaged .*{said}"):
        learn(model, after, store, given, tmp_path / "out")


def test_other_options_do_not_touch_what_was_trained(
    model: Checkpoint, store: Store, tmp_path: Path
) -> None:
    after = model.shape.with_(**SIZES)

    def stop(stage: str, done: float, total: float, /) -> None:
        if stage == "training" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(model, after, store, options(), tmp_path / "out", progress=stop)
    start = (tmp_path / "out" / "learning" / "start.safetensors").read_bytes()
    with pytest.raises(ShearlingError, match="is of a run with another model, data, shape or opt"):
        learn(model, after, store, options(spread=7.0), tmp_path / "out")
    assert (tmp_path / "out" / "learning" / "start.safetensors").read_bytes() == start
