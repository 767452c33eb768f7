"""A recipe run on a tiny model: every stage, a second call, changes, faults, and kill -9."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import process_work
import processes
from shearling.data.store import Store
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.recipes import run as running
from shearling.recipes import work
from shearling.recipes.read import read_recipe
from shearling.recipes.run import RecipeRun
from shearling.train.heal import Healed
from shearling.train.options import Options
from tiny_farm import SMALL, Farm
from tiny_tokenizer import byte_tokenizer

STAGES = [
    "01-pack", "02-text", "03-prune", "04-heal", "05-evaluate", "06-bench", "07-report",
]  # fmt: skip
# A cut by magnitude and nothing else, in a second.
BARE = (
    "heal=null", "evaluate=null", "bench=null", "report=null", "method.refit=false",
    "method.criteria=magnitude",
)  # fmt: skip

Copied = Callable[..., RecipeRun]


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_laptop_recipe(farm: Farm, whole: tuple[RecipeRun, dict[str, Any]]) -> None:
    run, told = whole
    assert told["made"] == STAGES
    assert told["stopped"] is None
    assert told["model"] == str(run.output / "04-heal")
    model = AutoModelForCausalLM.from_pretrained(told["model"])
    source = AutoModelForCausalLM.from_pretrained(farm.model)
    assert sum(p.numel() for p in model.parameters()) <= 0.8 * sum(
        p.numel() for p in source.parameters()
    )
    for name in STAGES:
        record = json.loads((run.output / f"{name}.json").read_text())
        assert (record["kind"], record["whole"]) == ("stage", True)
        for file, sha256 in record["files"].items():
            assert digest(run.output / name / file) == sha256
    assert len(list((run.output / "05-evaluate").glob("*/evaluation-*.json"))) == 3
    for page in told["pages"]:
        assert "04-heal" in Path(page).read_text()
    assert (run.output / "recipe.yaml").is_file()


def test_calibration_and_held_out_text_share_no_document(farm: Farm, whole: Any) -> None:
    folder, store = whole[0].output / "02-text", Store.open(whole[0].output / "01-pack")
    documents = {json.loads(line)["text"] for line in farm.text.read_text().splitlines()}
    parts = {}
    for part, name in (("train", "calibration"), ("held_out", "held-out")):
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        parts[part] = {json.loads(line)["text"] for line in lines}
        assert all(any(text in one for one in documents) for text in parts[part])
        rows = store.sequences("text", part)
        kept = " ".join(store_text(rows[range(len(rows))][0]))
        assert all(text in kept for text in parts[part] if len(text) > 12)
    assert parts["train"]
    assert parts["held_out"]


def store_text(ids_NT: torch.Tensor) -> list[str]:
    """Rows of a store of bytes as text; what is no byte ends a document."""
    return ["".join(BYTES.get(int(i), "\n") for i in row) for row in ids_NT]


def _bytes() -> dict[int, str]:
    tokenizer = byte_tokenizer()
    return {tokenizer(chr(code))["input_ids"][0]: chr(code) for code in range(32, 127)}


BYTES = _bytes()


def test_a_second_call_makes_nothing(copied: Copied) -> None:
    run = copied()
    before = {file: file.stat().st_mtime_ns for file in run.output.rglob("*.safetensors")}
    told = run.run()
    assert (told["made"], told["kept"]) == ([], STAGES)
    assert before == {file: file.stat().st_mtime_ns for file in before}


@pytest.mark.parametrize(
    ("change", "made"),
    [
        ("heal.save_every=100", []),  # which changes nothing of the result
        # More held-out text; calibration text is the same, and so all that was cut by it.
        ("evaluate.windows=3", ["02-text", "05-evaluate", "07-report"]),
    ],
)
def test_a_change_makes_what_depends_on_it(copied: Copied, change: str, made: list[str]) -> None:
    run = copied(change)
    assert run.run()["made"] == made
    assert copied(change).run()["made"] == []


def test_killed_between_a_stages_end_and_its_record(copied: Copied) -> None:
    run = copied()
    before = {file: file.stat().st_mtime_ns for file in run.output.rglob("*.safetensors")}
    for name in STAGES[:5]:
        file = run.output / f"{name}.json"
        begun = json.loads(file.read_text()) | {"whole": False, "output": "", "files": {}}
        file.write_text(json.dumps(begun))
    assert run.run()["made"] == STAGES[:5]  # which only says that they are whole
    assert before == {file: file.stat().st_mtime_ns for file in before}
    assert copied().run()["made"] == []


def test_records_name_no_path(whole: tuple[RecipeRun, dict[str, Any]]) -> None:
    for name in STAGES:
        assert str(whole[0].output.parent) not in (whole[0].output / f"{name}.json").read_text()


def test_a_change_of_healing(copied: Copied) -> None:
    states = copied("heal.lr=2e-2").states()
    assert [name for name, state in states.items() if state == "whole"] == STAGES[:3]
    assert states["04-heal"] == "changed"


@pytest.mark.parametrize(
    ("edit", "happened"),
    [
        (lambda d: (d / "config.json").write_text("{}"), "config.json was changed after"),
        (lambda d: (d / "more.txt").write_text("x"), "more.txt was put there after"),
        (lambda d: (d / "shearling.json").unlink(), "shearling.json was removed after"),
    ],
)
def test_a_stage_that_was_edited(copied: Copied, edit: Any, happened: str) -> None:
    run = copied()
    edit(run.output / "03-prune")
    with pytest.raises(ShearlingError, match=f"03-prune/{happened} the stage was made; .*remove"):
        run.run()
    with pytest.raises(ShearlingError, match=happened):
        run.plan()


def test_a_record_that_is_damaged(copied: Copied) -> None:
    run = copied()
    (run.output / "03-prune.json").write_text('{"kind": "stage"}')
    with pytest.raises(ShearlingError, match=r"03-prune.json: stage is missing .*; remove it"):
        run.run()


def test_a_directory_that_no_stage_made(farm: Farm, tmp_path: Path) -> None:
    (tmp_path / "run" / "01-pack").mkdir(parents=True)
    (tmp_path / "run" / "01-pack" / "notes").touch()
    with pytest.raises(ShearlingError, match="01-pack is there, but no stage of this recipe made"):
        farm.run(str(tmp_path / "run")).run()


def test_a_source_or_a_text_that_changed(farm: Farm, tmp_path: Path) -> None:
    model = Path(shutil.copytree(farm.model, tmp_path / "model"))
    text = Path(shutil.copy(farm.text, tmp_path / "text.jsonl"))
    own = Farm(tmp_path, model, text)
    assert own.run("run", *BARE).run()["made"] == ["01-pack", "02-text", "03-prune"]
    weights = model / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(ShearlingError, match=r"model changed since .*03-prune was made from it"):
        own.run("run", *BARE).run()
    weights.write_bytes(kept)
    text.write_text(text.read_text() + '\n{"text": "one more"}')
    with pytest.raises(ShearlingError, match=r"text.jsonl changed since .*01-pack was made from"):
        own.run("run", *BARE).plan()
    other = Path(shutil.copytree(farm.model, tmp_path / "other"))  # named otherwise: a change
    text.write_bytes(farm.text.read_bytes())
    assert own.run("run", *BARE, f"source={other}").run()["made"] == []
    before = digest(tmp_path / "run" / "03-prune" / "model.safetensors")
    shutil.rmtree(tmp_path / "run" / "01-pack")
    shutil.rmtree(tmp_path / "run" / "03-prune")  # both come back the same, and 02-text stays
    assert own.run("run", *BARE).run()["made"] == ["01-pack", "03-prune"]
    assert digest(tmp_path / "run" / "03-prune" / "model.safetensors") == before


def test_a_training_that_was_stopped(copied: Copied, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **how: Any) -> Healed:
        return Healed(None, 3, 10)

    monkeypatch.setattr(work, "heal", stopped)
    told = copied("heal.lr=2e-2").run()
    assert (told["made"], told["stopped"], told["model"]) == (
        [],
        "04-heal",
        str(copied().output / "03-prune"),
    )
    assert told["kept"] == STAGES[:3]


# --- refused before any work ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "sentence"),
    [
        (["target.params=0.001x"], "target cannot be met: .* parameters were asked for, but one"),
        (["target={shape: {hidden: 99}}"], "target cannot be met: .*hidden"),
        (["target={shape: {heads: 0.6x}}"], "target cannot be met: .*heads"),
        (["target={shape: {sheep: 0.7x}}"], "target cannot be met: shape has sheep"),
        (["target={layers: 9}"], "target cannot be met: .*9"),
        (["method={kind: blocks}", "target={shape: {mlp: 40}}"], "changes mlp; give layers"),
        (["method={kind: gates, tokens: 600}", "target={shape: {vocab: 90}}"], "is not learned"),
        (["method.criteria=guess"], "guess"),
        (["source=null"], "names no model to make smaller"),
        (["data.text=nowhere.txt"], "There is no text at .*nowhere.txt"),
        (["data.calibration=nowhere.txt"], "data.calibration .*nowhere.txt is not there"),
        (["evaluate.text=nowhere.txt"], "evaluate.text .*nowhere.txt is not there"),
        (["evaluate.suite=nothing"], "--suite nothing is neither built in"),
        (["data=null"], "names no data, on which it is healed"),
        (["device=tpu"], "--device tpu was given"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    farm: Farm, pairs: list[str], sentence: str
) -> None:
    changes = {"source": str(farm.model), "data.text": str(farm.text)}
    named = {pair.split("=")[0] for pair in pairs}
    changes = {key: one for key, one in changes.items() if not {key, key.split(".")[0]} & named}
    with pytest.raises(ShearlingError, match=f"(?s){sentence}"):
        RecipeRun(read_recipe("laptop", pairs, changes), farm.root / "no")
    assert not (farm.root / "no").exists()


def test_what_does_not_fit(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "free_bytes", lambda device: 1000)
    with pytest.raises(ShearlingError, match=r"04-heal needs at least 0.0 GB of memory, but"):
        farm.run("no").run()
    monkeypatch.undo()
    monkeypatch.setattr(running.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(ShearlingError, match=r"no needs about 0.0 GB, but its disk has 0.0 GB"):
        farm.run("no").run()
    assert not (farm.root / "no").exists()


def test_more_tokens_than_there_are_is_said(farm: Farm) -> None:
    farm.run("no", "heal.tokens=1M")
    assert any("they would be seen" in one for one in farm.said)


def test_how_often_all_of_the_data_is_seen_is_said(farm: Farm, whole: Any) -> None:
    """Counted here from the store; the run asked for less than one epoch and said nothing."""
    store = Store.open(whole[0].output / "01-pack")
    there = 32 * len(store.sequences("text"))
    said: list[str] = []
    for tokens in (there, 3 * there):
        given = work.StageWork(farm.root, {}, {}, notify=said.append)
        work.tell_epochs(given, store, Options(tokens=tokens))
    assert len(said) == 1
    assert f"holds {there:,} to train on: they are seen 3.0 times" in said[0]


# --- other ways ----------------------------------------------------------------------------------


def test_stages_of_other_recipes(farm: Farm) -> None:
    def kinds(*pairs: str, recipe: str = "laptop") -> list[str]:
        return [stage.kind.name for stage in farm.run("no", *pairs, recipe=recipe).stages]

    end = ["evaluate", "bench", "report"]
    assert kinds(recipe="progressive") == ["pack", "text", *(["prune", "heal"] * 3), *end]
    gates = "method={kind: gates, recipe: sheared, tokens: 600, sample_length: 16}"
    dynamic = ("target={shape: {layers: 4, mlp: 40}}", gates, "heal.mix=dynamic")
    assert kinds(*dynamic) == ["pack", "text", "reference", "learn", "heal", *end]
    given = ("heal.mix=dynamic", "heal.reference={text: 2.0}")
    assert kinds(*given) == ["pack", "text", "prune", "heal", *end]


def test_steps_are_shares_of_the_source(farm: Farm) -> None:
    run = farm.run("no", recipe="progressive")
    sizes = [stage.options["size"]["params"] for stage in run.stages if stage.kind.name == "prune"]
    count = AutoModelForCausalLM.from_pretrained(farm.model).num_parameters()
    assert sizes == [int(count * share) for share in (0.85, 0.72, 0.6)]


def test_a_cut_at_once_costs_what_training_the_smaller_model_does(farm: Farm) -> None:
    def cost(recipe: str) -> Any:
        gates = f"method={{kind: gates, recipe: {recipe}, tokens: 600, batch: 2}}"
        stages = farm.run("no", "target={shape: {layers: 2, mlp: 40}}", gates).stages
        return next(stage.cost for stage in stages if stage.kind.name == "learn")

    at_once, gated = cost("scores"), cost("warm")
    assert at_once.seconds < gated.seconds
    assert at_once.least < gated.least
    assert at_once.says == gated.says
    source = Checkpoint.open(farm.model)
    small = source.layout.count(source.shape.with_(layers=2, mlp=40))
    assert at_once.least == 16 * small


def test_gates_and_a_dynamic_mix(farm: Farm) -> None:
    gates = "method={kind: gates, recipe: sheared, tokens: 120, batch: 2, mix: proportional}"
    pairs = (
        "target={shape: {layers: 4, mlp: 40}}", gates, "heal.mix=dynamic", "heal.tokens=120",
        "evaluate=null", "bench=null", "report=null", "heal.eval_sequences=2",
    )  # fmt: skip
    run = farm.run("gates", *pairs)
    made = run.run()["made"]
    assert [name[3:] for name in made] == ["pack", "learn", "reference", "heal"]
    config = json.loads((run.output / made[-1] / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (4, 40)
    assert farm.run("gates", *pairs).run()["made"] == []


# --- kill -9 -------------------------------------------------------------------------------------


def test_killed_in_every_stage_it_ends_the_same(farm: Farm, whole: Any, tmp_path: Path) -> None:
    pairs = [*SMALL, "bench=null"]
    changes = {"source": str(farm.model), "data.text": str(farm.text)}
    for stage in ("01-pack", "02-text", "03-prune", "04-heal", "05-evaluate", "06-report"):
        process = processes.started(
            process_work.killed_recipe, pairs, changes, tmp_path / "run", stage,
            said=tmp_path / stage,
        )  # fmt: skip
        assert processes.ended(process, tmp_path / stage, fails=True) == [-9], stage
    run = farm.run(str(tmp_path / "run"), "bench=null")
    assert run.states()["05-evaluate"] == "whole"
    assert run.run()["made"] == ["06-report"]
    undisturbed = whole[0].output
    for file in (
        "01-pack/store.json", "01-pack/text/train/tokens.bin", "02-text/calibration.jsonl",
        "02-text/held-out.jsonl", "03-prune/model.safetensors", "03-prune/config.json",
        "04-heal/model.safetensors", "04-heal/config.json",
    ):  # fmt: skip
        assert digest(run.output / file) == digest(undisturbed / file), file
    measured = [figures(place / "05-evaluate") for place in (run.output, undisturbed)]
    assert measured[0] == measured[1]


def figures(directory: Path) -> dict[str, float]:
    """Losses by file: what else an evaluation says are times."""
    files = sorted(directory.glob("*/evaluation-*.json"))
    return {file.name + file.parent.name: json.loads(file.read_text())["nll"] for file in files}
