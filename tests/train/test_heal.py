"""Recipes, what they hand back, and what is refused before anything is loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import naive
from shearling.data.store import Store
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.cut import cut
from shearling.table.values import Keep
from shearling.train import adapters
from shearling.train.estimate import check_host_memory, estimate
from shearling.train.heal import heal
from shearling.train.options import Options
from tiny_cuts import relative
from tiny_models import HYBRIDS, MIXTURES, OF_TWO_WIDTHS, tiny_model
from tiny_tokenizer import write_llama


def options(**changed: Any) -> Options:
    values = {"tokens": 6 * 4 * 24, "batch": 4, "lr": 1e-2, "eval_every": 3, "eval_sequences": 2}
    return Options.model_validate(values | changed)


def digests(path: Path) -> list[bytes]:
    return [hashlib.sha256(file.read_bytes()).digest() for file in sorted(path.iterdir())]


@pytest.mark.parametrize("recipe", ["cpt", "lora", "cpt-then-lora", "distill"])
def test_a_stock_model_comes_back(
    model: Checkpoint, teacher: Checkpoint, store: Store, tmp_path: Path, recipe: str
) -> None:
    before = digests(model.path)
    wise = teacher if recipe == "distill" else None
    healed = heal(model, store, options(recipe=recipe), tmp_path / "out", teacher=wise)
    assert digests(model.path) == before, "the source is never written to"
    assert healed.model is not None
    assert healed.model.shape == model.shape
    names = {path.name for path in (tmp_path / "out").iterdir()}
    source = {path.name for path in model.path.iterdir()}
    assert names == source | {"healing", "shearling.json"}
    manifest = json.loads((tmp_path / "out" / "shearling.json").read_text())
    assert (manifest["kind"], manifest["stage"]) == ("manifest", "heal")
    assert manifest["model"]["fingerprint"] == healed.model.fingerprint
    assert manifest["source"]["fingerprint"] == model.fingerprint
    assert sum(manifest["losses"]["after"].values()) < sum(manifest["losses"]["before"].values())
    stock = naive.stock(tmp_path / "out")
    ids, _ = store.sequences("pen", "held_out")[[0, 1]]
    with torch.no_grad():
        nll = float(naive.token_nll(stock, ids).mean())
    assert manifest["losses"]["after"]["pen"] == pytest.approx(nll, rel=1e-5)


def test_the_next_run_begins_with_the_phase_before(
    model: Checkpoint, store: Store, tmp_path: Path
) -> None:
    heal(model, store, options(recipe="cpt-then-lora"), tmp_path / "out")
    logs = [
        [json.loads(line) for line in file.read_text().splitlines()]
        for file in sorted((tmp_path / "out" / "healing").glob("*/log.jsonl"))
    ]
    assert logs[1][0]["losses"] == pytest.approx(logs[0][-1]["losses"], rel=1e-5)


@pytest.mark.parametrize("recipe", ["cpt", "distill"])
def test_a_cut_model_is_healed_towards_its_source(
    teacher: Checkpoint, store: Store, tmp_path: Path, recipe: str
) -> None:
    smaller = cut(teacher, Keep({"layers": (0, 1, 4)}), tmp_path / "cut")
    healed = heal(smaller, store, options(recipe=recipe), tmp_path / "out", teacher=teacher)
    assert healed.model is not None
    manifest = json.loads((tmp_path / "out" / "shearling.json").read_text())
    assert manifest["parent"]["stage"] == "prune"
    assert manifest["shape"]["layers"] == 3


def test_bfloat16_comes_back_as_it_came(store: Store, tmp_path: Path) -> None:
    source = Checkpoint.open(write_llama(tmp_path / "half", layers=2, dtype=torch.bfloat16))
    healed = heal(source, store, options(), tmp_path / "out")
    assert healed.model is not None
    assert set(healed.model.dtypes.values()) == {"BF16"}


def test_adapters_merge_as_peft_does(model: Checkpoint) -> None:
    torch.manual_seed(0)
    adapted = adapters.add(naive.stock(model.path), model, rank=3, alpha=7)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert len(trained) == 2 * 7 * model.shape["layers"], "seven projections of every block"
    read = adapters.reader(adapted)
    names = list(naive.stock(model.path).state_dict())
    found = {name: read(name) for name in names}
    merged = adapted.merge_and_unload().state_dict()
    for name in names:
        torch.testing.assert_close(found[name], merged[name])


@pytest.mark.parametrize("variant", [*MIXTURES, *HYBRIDS, *OF_TWO_WIDTHS])
def test_adapters_of_mixtures_are_merged(tmp_path: Path, variant: str) -> None:
    """Beside attention, dense MLPs and shared experts; stock logits are those with adapters."""
    torch.manual_seed(0)
    tiny_model(variant).save_pretrained(tmp_path / "m")
    source = Checkpoint.open(tmp_path / "m")
    adapted = adapters.add(naive.stock(tmp_path / "m"), source, rank=3, alpha=7)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    owners = {n.rpartition(".lora_A")[0] for n, _ in adapted.named_parameters() if "lora_A" in n}
    rows = adapters.adapted_rows(source)
    places = source.layout.places(source.shape)
    assert len(owners) == sum(row in rows for row, _ in places.values())
    assert not any(".experts" in owner for owner in owners)
    read, merged = adapters.reader(adapted), naive.stock(tmp_path / "m")
    ids = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        expected = adapted(input_ids=ids, use_cache=False).logits
        assert relative(merged(input_ids=ids, use_cache=False).logits, expected) > 0.01
        for name, parameter in merged.named_parameters():
            parameter.copy_(read(name))
        found = merged(input_ids=ids, use_cache=False).logits
    assert relative(found, expected) < 1e-4  # 3e-5 with linear attention


def test_activations_computed_anew_change_nothing(
    model: Checkpoint, store: Store, tmp_path: Path
) -> None:
    weights = []
    for again in (False, True):
        heal(model, store, options(checkpointing=again), tmp_path / f"{again}")
        weights.append((tmp_path / f"{again}" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


# --- what a user can get wrong -------------------------------------------------------------------


def refused(message: str, *arguments: Any, **named: Any) -> None:
    with pytest.raises(ShearlingError, match=message):
        heal(*arguments, **named)


def test_what_is_refused(
    model: Checkpoint, teacher: Checkpoint, store: Store, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    refused("give --teacher", model, store, options(recipe="distill"), out)
    refused("mix=dynamic follows losses .* --reference", model, store, options(mix="dynamic"), out)
    refused("weights", model, store, options(mix="constant", weights={"fell": 1.0}), out)
    given = {"fell": 1.0, "meadow": 1.0}
    refused("pen", model, store, options(mix="dynamic"), out, reference=given)
    assert not out.exists()


def test_a_teacher_of_another_vocabulary(
    model: Checkpoint, teacher: Checkpoint, store: Store, tmp_path: Path
) -> None:
    vocab = (*range(200), 256, 257)
    with_less = Keep({"vocab": vocab})
    shape = teacher.layout.cut(with_less, teacher.shape).after
    smaller = dataclasses.replace(teacher, shape=shape)
    refused(
        "the teacher knows 202 tokens and the model 260",
        model, store, options(recipe="distill"), tmp_path / "out", teacher=smaller,
    )  # fmt: skip


def test_outputs_that_are_taken(model: Checkpoint, store: Store, tmp_path: Path) -> None:
    heal(model, store, options(), tmp_path / "done")
    refused("holds a finished model", model, store, options(), tmp_path / "done")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    refused("not of a healing run", model, store, options(), tmp_path / "other")
    # An end that was cut short between two renames is gone through once more.
    shutil.copytree(tmp_path / "done", tmp_path / "short")
    (tmp_path / "short" / "config.json").unlink()
    healed = heal(model, store, options(), tmp_path / "short")
    assert healed.model is not None
    assert digests_of(tmp_path / "short") == digests_of(tmp_path / "done")


def digests_of(path: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in path.iterdir() if f.suffix == ".safetensors"}


def test_data_of_another_tokenizer(store: Store, tmp_path: Path) -> None:
    path = write_llama(tmp_path / "other", layers=2)
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["Ġ"], vocab["a"] = vocab["a"], vocab["Ġ"]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused("tokenizer", Checkpoint.open(path), store, options(), tmp_path / "out")


def test_what_no_memory_holds_is_refused_before_it_is_loaded(
    model: Checkpoint, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = estimate(model, options(), 1)
    standing = needed.weights + needed.gradients + needed.moments
    monkeypatch.setattr("shearling.train.estimate.free_bytes", lambda: standing)
    check_host_memory(model, options(), ranks=1, teacher=None)
    monkeypatch.setattr("shearling.train.estimate.free_bytes", lambda: standing - 1)
    with pytest.raises(ShearlingError, match=r"[1-9]\S* [kM]B of memory .* [kM]B without"):
        heal(model, store, options(), tmp_path / "out")
    check_host_memory(model, options(recipe="lora"), ranks=1, teacher=None)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_of_one_machine_share_its_memory(
    model: Checkpoint, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = estimate(model, options(), 1)
    standing = needed.weights + needed.gradients + needed.moments
    monkeypatch.setattr("shearling.train.estimate.free_bytes", lambda: standing)
    check_host_memory(model, options(), ranks=ranks, teacher=None)
    asked: list[float] = []
    with pytest.raises(ShearlingError, match=r"adamw8bit with weight_dtype=bfloat16") as error:
        check_host_memory(
            model, options(), ranks=ranks, teacher=None,
            least=lambda free: asked.append(free) or 0.9 * free,
        )  # fmt: skip
    assert asked == [standing]
    assert ("in one process" in str(error.value)) is (ranks > 1)
    # adapters alone are divided: each rank has the whole model
    lora = options(recipe="lora")
    monkeypatch.setattr("shearling.train.estimate.free_bytes", lambda: int(1.9 * needed.weights))
    if ranks == 1:
        check_host_memory(model, lora, ranks=ranks, teacher=None)
    else:
        with pytest.raises(ShearlingError, match="memory are free"):
            check_host_memory(model, lora, ranks=ranks, teacher=None)


def test_what_is_advised_where_memory_is_short_is_accepted() -> None:
    options(optimizer="adamw8bit", weight_dtype="bfloat16")


def test_estimates(model: Checkpoint, teacher: Checkpoint) -> None:
    found = estimate(model, options(), 24, ranks=2)
    total = sum(p.numel() for p in naive.stock(model.path).parameters())
    assert found.parameters == total
    assert (found.weights, found.gradients, found.moments) == (2 * total, 2 * total, 4 * total)
    assert (found.steps, found.tokens) == (6, 6 * 4 * 24)
    assert found.flops == 6 * total * found.tokens
    few = estimate(model, options(recipe="lora", rank=3), 24)
    adapted = adapters.add(naive.stock(model.path), model, rank=3, alpha=7)
    assert few.gradients == 4 * sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    taught = estimate(model, options(recipe="distill"), 24, teacher=teacher)
    assert taught.teacher == 4 * teacher.parameters
    thrifty = estimate(model, options(checkpointing=True), 24)
    assert thrifty.activations < estimate(model, options(), 24).activations
    assert "B a rank" in found.as_text()
