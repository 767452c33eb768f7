"""What a run leaves for the report: looks over all phases, their time, and the references."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shearling.data.store import Store
from shearling.gates.learn import learn
from shearling.gates.options import LearnOptions
from shearling.model.checkpoint import Checkpoint
from shearling.report.records.collect import collect
from shearling.train.finish import _elapsed
from shearling.train.heal import heal
from shearling.train.log import Log, read
from shearling.train.options import Options

GIVEN: dict[str, Any] = {
    "tokens": 8 * 4 * 24, "batch": 4, "micro": 2, "eval_every": 2, "eval_sequences": 2,
}  # fmt: skip


def history(output: Path) -> dict[str, Any]:
    return json.loads((output / "healing" / "healing.json").read_text())


def trained(folder: Path) -> list[dict[str, Any]]:
    return [record for record in read(folder) if record["kind"] == "train"]


def interrupted(model: Checkpoint, store: Store, output: Path) -> tuple[Options, Path]:
    """A run that ends in its fifth step, one behind its checkpoint: its options and its folder."""

    def fail(stage: str, done: float, total: float, /) -> None:
        if stage == "training" and done == 5:
            raise KeyboardInterrupt

    options = Options(save_every=4, **GIVEN)
    with pytest.raises(KeyboardInterrupt):
        heal(model, store, options, output, progress=fail)
    return options, output / "healing" / "cpt"


def test_seconds_of_two_phases(model: Checkpoint, store: Store, tmp_path: Path) -> None:
    """Those of the last step before each look, the second phase's after all of the first's."""
    output = tmp_path / "out"
    heal(model, store, Options(recipe="cpt-then-lora", **GIVEN), output)
    looks = history(output)["looks"]
    parts = [trained(output / "healing" / name) for name in ("1-cpt", "2-lora")]
    assert [len(part) for part in parts] == [4, 4]
    first, second = ([0.0, *(r["seconds"] for r in part)] for part in parts)
    expected = [first[step] for step in (0, 2, 4)] + [first[4] + second[step] for step in (0, 2, 4)]
    assert [look["seconds"] for look in looks] == pytest.approx(expected, abs=0.006)
    assert [look["tokens"] for look in looks] == [96 * step for step in (0, 2, 4, 4, 6, 8)]
    manifest = json.loads((output / "shearling.json").read_text())
    assert manifest["seconds"] == pytest.approx(looks[-1]["seconds"], abs=0.011)
    (found,) = collect([output]).healings
    assert found.seconds == tuple(look["seconds"] for look in looks)


def test_seconds_before_an_interruption_count(
    model: Checkpoint, store: Store, tmp_path: Path
) -> None:
    options, folder = interrupted(model, store, tmp_path / "out")
    # An hour went by until the checkpoint.
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    slow = [line | ({"seconds": 3600.0} if line["step"] == 4 else {}) for line in lines]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in slow))
    heal(model, store, options, tmp_path / "out")
    seconds = {look["tokens"] // 96: look["seconds"] for look in history(tmp_path / "out")["looks"]}
    assert seconds[2] < 60
    assert seconds[4] == 3600
    assert 3600 < seconds[6] < seconds[8] < 3660


def test_a_short_first_part_counts(model: Checkpoint, store: Store, tmp_path: Path) -> None:
    """Although the seconds of the second part never fall below its own."""
    options, folder = interrupted(model, store, tmp_path / "out")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    quick = [line | ({"seconds": 1e-4} if "seconds" in line else {}) for line in lines]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in quick))
    heal(model, store, options, tmp_path / "out")
    assert [r["step"] for r in trained(folder) if r.get("resumed")] == [5]
    seconds = trained(folder)[-1]["seconds"]
    assert _elapsed(read(folder))[-1] == pytest.approx(1e-4 + seconds, abs=1e-6)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_know_the_run_and_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    told: list[Any] = []
    library = SimpleNamespace(
        init=lambda **given: told.append(given["name"]) or SimpleNamespace(),
        log=lambda record, step: told.append((step, record["loss"])),
        finish=lambda: told.append("finished"),
    )
    monkeypatch.setitem(sys.modules, name, library)
    log = Log(tmp_path / "lambs" / "healing" / "2-lora", after=0, trackers=[name])
    log.write({"kind": "train", "step": 1, "loss": 2.0})
    log.close()
    assert told == ["lambs 2-lora", (1, 2.0), "finished"]


@pytest.mark.parametrize("mix", ["dynamic", "proportional"])
def test_references_of_the_mix(model: Checkpoint, store: Store, tmp_path: Path, mix: str) -> None:
    reference = {"fell": 1.5, "meadow": 2.0, "pen": 2.5}
    options = Options.model_validate(GIVEN | {"mix": mix, "update_every": 2})
    heal(model, store, options, tmp_path / "out", reference=reference)
    followed = mix == "dynamic"
    assert history(tmp_path / "out")["reference"] == (reference if followed else None)
    (found,) = collect([tmp_path / "out"]).healings
    assert found.reference == (reference if followed else {})


def test_a_cut_beside_the_phases_is_none(model: Checkpoint, store: Store, tmp_path: Path) -> None:
    """``gates=scores`` keeps its one-shot cut there, sorted before the only phase, distill."""
    options = LearnOptions(recipe="distill", gates="scores", refit=False, samples=4,
                           sample_length=16, **GIVEN)  # fmt: skip
    learn(model, model.shape.with_(mlp=20), store, options, tmp_path / "out", teacher=model)
    assert (tmp_path / "out" / "healing" / "cut").is_dir()
    assert [look["tokens"] for look in history(tmp_path / "out")["looks"]] == [
        96 * step for step in (0, 2, 4, 6, 8)
    ]
