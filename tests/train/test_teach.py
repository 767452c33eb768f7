"""A teacher kept on disk: what is kept, what a loss makes of it, and healing that uses it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

import naive
import shearling.train.objective
import shearling.train.teach
from places import place
from shearling.data.store import IGNORED, Store
from shearling.data.teacher import Cache, Kept
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.train.heal import heal
from shearling.train.log import read
from shearling.train.objective import Distillation, Objective
from shearling.train.options import Options
from shearling.train.teach import cost, teach
from small_disk import files_of_at_most
from tiny_models import LEADING

Models = Callable[[str], Path]
LENGTH = 24


def stored(root: Path) -> Store:
    """Two domains by hand, of 7 and 3 sequences of 11 tokens that every tiny model knows."""
    domains: dict[str, Any] = {}
    draw = np.random.default_rng(3)
    for domain, rows in (("fell", 7), ("pen", 3)):
        domains[domain] = {}
        for part, count in (("train", rows), ("held_out", 1)):
            folder = root / domain / part
            folder.mkdir(parents=True)
            draw.integers(3, 101, (count, 11)).astype("<u2").tofile(folder / "tokens.bin")
            domains[domain][part] = {"sequences": count}
    manifest = {
        "kind": "token-store", "version": 1, "length": 11, "dtype": "uint16",
        "tokenizer": {"name": "tiny", "sha256": "0" * 64}, "domains": domains,
    }  # fmt: skip
    (root / "store.json").write_text(json.dumps(manifest))
    return Store.open(root)


def small_shards(monkeypatch: pytest.MonkeyPatch, size: int = 1) -> None:
    monkeypatch.setattr(shearling.train.teach, "SHARD_BYTES", size)


# --- what is kept --------------------------------------------------------------------------------


# That a streamed model is the resident one is shown elsewhere; the walk here is tried both ways.
STREAMED = [(variant, bool(n % 2)) for n, variant in enumerate(LEADING)] + [("llama", True)]


@pytest.mark.parametrize(("variant", "stream"), STREAMED)
def test_what_is_kept_is_what_the_stock_model_says(
    models: Models, variant: str, stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "check_tokenizer", lambda self, path, bos: None)
    monkeypatch.setattr(shearling.train.teach, "CHUNK", 7)
    small_shards(monkeypatch, 10 * (9 * 4 + 4) * 3)  # three sequences each
    store, top = stored(tmp_path / "store"), 9
    seen: list[tuple[float, float]] = []
    cache = teach(
        Checkpoint.open(models(variant)), store, tmp_path / "cache", top=top,
        place=place(not stream),
        progress=lambda stage, *at: seen.append(at) if "running" in stage else None,
    )  # fmt: skip
    assert sorted(f.relative_to(cache.path).as_posix() for f in cache.path.rglob("*.*")) == [
        "fell/00000000.safetensors", "fell/00000003.safetensors", "fell/00000006.safetensors",
        "pen/00000000.safetensors", "teacher.json",
    ]  # fmt: skip
    assert seen[-1] == (10, 10)
    assert seen == sorted(seen)
    model = naive.stock(models(variant))
    rows = [("fell", 6), ("pen", 2), ("fell", 0), ("pen", 0), ("fell", 4), ("fell", 6)]
    kept = cache.read(rows)
    for at, (domain, row) in enumerate(rows):
        ids, _ = store.sequences(domain)[[row]]
        with torch.no_grad():
            logp = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        expected, tokens = logp.sort(-1, descending=True)
        assert torch.equal(kept.ids[at].long(), tokens[:, :top])
        torch.testing.assert_close(kept.logp[at].float(), expected[:, :top], rtol=2**-10, atol=1e-5)
        torch.testing.assert_close(
            kept.rest[at], expected[:, top:].exp().sum(-1), rtol=1e-4, atol=1e-7
        )


def test_costs_are_what_is_written(
    teacher: Checkpoint, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_shards(monkeypatch, 10**6)
    expected = cost(teacher, store, 5)
    cache = teach(teacher, store, tmp_path / "cache", top=5)
    files = list(cache.path.glob("*/*.safetensors"))
    assert sum(t.nbytes for file in files for t in load_file(file).values()) == expected.bytes
    assert expected.sequences == sum(len(store.sequences(domain)) for domain in store.domains)
    assert expected.tokens == expected.sequences * LENGTH
    assert expected.assumed_seconds == 2 * teacher.parameters * expected.tokens / 1.2e11
    assert f"{expected.sequences:,} sequences" in expected.as_text()


class _Killed(Exception):
    pass


def contents(path: Path) -> dict[str, bytes]:
    found = (file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in found}


def test_a_stopped_walk_goes_on(
    teacher: Checkpoint, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the last whole shard, to the same bytes; what is finished is left alone."""
    small_shards(monkeypatch, 20_000)
    whole = contents(teach(teacher, store, tmp_path / "whole", top=4).path)
    ran: list[float] = []

    def stop(stage: str, done: float, total: float, /) -> None:
        if done > total / 2:
            raise _Killed

    output = tmp_path / "parts"
    with pytest.raises(_Killed):
        teach(teacher, store, output, top=4, progress=stop)
    before = {name for name in contents(output) if name in whole}
    assert 0 < len(before) < len(whole) - 1
    with pytest.raises(ShearlingError, match="is not finished; give the same command again"):
        Cache.open(output)
    (output / ".unfinished" / "00000000.safetensors").write_text("half")
    with pytest.raises(ShearlingError, match="was made with another top"):
        teach(teacher, store, output, top=3)
    teach(teacher, store, output, top=4, progress=lambda _, done, __: ran.append(done))
    assert min(ran) > 0
    assert contents(output) == whole
    monkeypatch.setattr(shearling.train.teach, "BlockStream", lambda *_, **__: pytest.fail("ran"))
    teach(teacher, store, output, top=4)
    assert contents(output) == whole


def test_a_disk_that_runs_full(
    teacher: Checkpoint, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_shards(monkeypatch, 20_000)
    output = tmp_path / "cache"
    with ExitStack() as limit:

        def fill(stage: str, done: float, total: float, /) -> None:
            if done > total / 2:
                limit.enter_context(files_of_at_most(5_000))

        with pytest.raises(ShearlingError, match="the disk ran full while writing"):
            teach(teacher, store, output, top=4, progress=fill)
    assert [file.name for file in (output / ".unfinished").iterdir()] == ["plan.json"]
    assert list(output.glob("fell/*.safetensors"))
    teach(teacher, store, output, top=4)
    assert contents(output) == contents(teach(teacher, store, tmp_path / "whole", top=4).path)


def test_one_process_at_a_time(teacher: Checkpoint, store: Store, tmp_path: Path) -> None:
    def again(stage: str, done: float, total: float, /) -> None:
        with pytest.raises(ShearlingError, match=f"is being written by process {os.getpid()};"):
            teach(teacher, store, tmp_path / "cache", top=4)

    teach(teacher, store, tmp_path / "cache", top=4, progress=again)


def test_a_start_that_kept_nothing_binds_to_nothing(
    teacher: Checkpoint, store: Store, tmp_path: Path
) -> None:
    def stop(stage: str, done: float, total: float, /) -> None:
        raise _Killed

    with pytest.raises(_Killed):
        teach(teacher, store, tmp_path / "cache", top=4, progress=stop)
    assert teach(teacher, store, tmp_path / "cache", top=3).top == 3


def test_what_is_refused_at_the_start_leaves_nothing(
    teacher: Checkpoint, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ShearlingError("baa")

    monkeypatch.setattr(shearling.train.teach, "_compute", refuse)
    with pytest.raises(ShearlingError, match="baa"):
        teach(teacher, store, tmp_path / "cache", top=4)
    assert not (tmp_path / "cache").exists()


def test_what_cannot_be_kept(
    model: Checkpoint, teacher: Checkpoint, store: Store, tmp_path: Path, models: Models
) -> None:
    out = tmp_path / "cache"
    with pytest.raises(ShearlingError, match="--top 0 was given, .* 260 tokens; keep 1 to 260"):
        teach(teacher, store, out, top=0)
    with pytest.raises(ShearlingError, match="keep 1 to 260"):
        teach(teacher, store, out, top=261)
    with pytest.raises(ShearlingError, match="no tokenizer"):
        teach(Checkpoint.open(models("llama")), store, out)
    assert not out.exists()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ShearlingError, match="not empty"):
        teach(teacher, store, tmp_path)
    teach(teacher, store, out, top=2)
    with pytest.raises(ShearlingError, match="was made with another teacher"):
        teach(model, store, out, top=2)


def test_a_teacher_that_computes_no_numbers(
    teacher: Checkpoint, store: Store, tmp_path: Path
) -> None:
    broken = naive.stock(teacher.path)
    with torch.no_grad():
        broken.get_input_embeddings().weight[:] = float("nan")
    shutil.copytree(teacher.path, tmp_path / "broken")
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(ShearlingError, match=r"^the tensor model\.embed_tokens\.weight of"):
        teach(Checkpoint.open(tmp_path / "broken"), store, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_caches_that_cannot_be_opened(teacher: Checkpoint, store: Store, tmp_path: Path) -> None:
    with pytest.raises(ShearlingError, match="is no cache of a teacher; make one"):
        Cache.open(tmp_path)
    cache = teach(teacher, store, tmp_path / "cache", top=2)
    file = cache.path / "pen" / "00000000.safetensors"
    whole = file.read_bytes()
    file.write_bytes(bytes(8) + whole[8:])
    with pytest.raises(ShearlingError, match="00000000.safetensors cannot be read"):
        cache.read([("pen", 0)])
    file.write_bytes(whole[:-1])
    with pytest.raises(ShearlingError, match=f"has {len(whole) - 1:,} bytes, where {len(whole):,}"):
        Cache.open(cache.path)
    file.write_bytes(whole)
    manifest = cache.path / "teacher.json"
    said = manifest.read_text()
    values = json.loads(said)
    values["store"]["length"] = 2**30
    manifest.write_text(json.dumps(values))  # refused before room is made
    with pytest.raises(ShearlingError, match="one sequence of 1073741824 tokens with 2 kept"):
        Cache.open(cache.path)
    manifest.write_text(said)
    file.unlink()
    with pytest.raises(ShearlingError, match="is missing"):
        Cache.open(cache.path)
    manifest.write_text('{"kind": "teacher-cache", "version": 2}')
    with pytest.raises(ShearlingError, match="version 2"):
        Cache.open(cache.path)


# --- what a loss makes of it ---------------------------------------------------------------------


def kept_of(logits_BPV: Tensor, top: int) -> Kept:
    """As a cache would hold it, but in float32."""
    logp, ids = logits_BPV.log_softmax(-1).sort(-1, descending=True)
    return Kept(ids[..., :top].int(), logp[..., :top], logp[..., top:].exp().sum(-1))


@pytest.mark.parametrize("top", [1, 10, 101])
@pytest.mark.parametrize("text_share", [0.0, 0.3])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2", "gpt_neox", "opt"])
def test_the_divergence_of_merged_outcomes(
    models: Models, name: str, top: int, text_share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K tokens and one outcome for the rest; with all 101 kept, a loaded teacher's own loss."""
    monkeypatch.setattr(shearling.train.objective, "CHUNK", 20)
    model, wise = naive.stock(models(name)).requires_grad_(True), naive.stock(models(name))
    with torch.no_grad():
        draw = torch.Generator().manual_seed(4)
        for parameter in wise.parameters():
            parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=draw))
    ids_BS = torch.randint(3, 101, (3, 17), generator=torch.Generator().manual_seed(2))
    labels_BS = ids_BS.clone()
    labels_BS[0, :9] = IGNORED
    counting = labels_BS[:, 1:].flatten() != IGNORED
    with torch.no_grad():
        wanted = wise(input_ids=ids_BS, use_cache=False).logits[:, :-1]
    plain = Checkpoint.open(models(name)).plain_head
    objective = Objective(model, plain_head=plain, distillation=Distillation(text_share=text_share))
    found = objective(ids_BS, labels_BS, kept_of(wanted, top))
    found.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    mine = model(input_ids=ids_BS, use_cache=False).logits[:, :-1].flatten(0, 1)[counting]
    p, order = wanted.flatten(0, 1)[counting].double().softmax(-1).sort(-1, descending=True)
    q = mine.double().softmax(-1).gather(-1, order)
    pairs = [(p[:, :top], q[:, :top])]
    if top < 101:
        pairs.append((p[:, top:].sum(-1), q[:, top:].sum(-1)))
    expected = torch.stack([(a * (a.log() - b.log())).sum() for a, b in pairs]).sum()
    text = functional.cross_entropy(mine, labels_BS[:, 1:].flatten()[counting], reduction="sum")
    expected = (1 - text_share) * expected + text_share * text
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    expected.backward()
    largest = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    for parameter_name, parameter in model.named_parameters():
        if parameter.grad is not None:
            off = float((gradients[parameter_name] - parameter.grad).abs().max())
            assert off < 2e-4 * (float(parameter.grad.abs().max()) + 1e-3 * largest)
    with torch.no_grad():
        loaded = Objective(
            model, plain_head=plain, teacher=wise, distillation=Distillation(text_share=text_share)
        )
        whole = float(loaded(ids_BS, labels_BS))
    if top == 101:
        assert found.item() == pytest.approx(whole, rel=1e-5)
    elif not text_share:
        assert found.item() < whole * (1 - 1e-4)
    assert torch.equal(
        objective(ids_BS, labels_BS, kept_of(wanted, top), held_out=True),
        objective(ids_BS, labels_BS, held_out=True),
    )


def test_no_mass_is_left_out(models: Models) -> None:
    """Certainty: a rest of 0 and log-probabilities of 0 give numbers, and so do gradients."""
    model = naive.stock(models("llama")).requires_grad_(True)
    ids_BS = torch.arange(4, 14).view(2, 5)
    sure = Kept(
        torch.stack([ids_BS[:, 1:], ids_BS[:, 1:] + 1], -1),
        torch.tensor([0.0, -torch.inf]).expand(2, 4, 2).half(), torch.zeros(2, 4),
    )  # fmt: skip
    objective = Objective(model, plain_head=True)
    found = objective(ids_BS, ids_BS, sure)
    assert found.item() == pytest.approx(objective(ids_BS, ids_BS).item(), rel=1e-5)
    found.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# --- healing -------------------------------------------------------------------------------------


def options(**changed: Any) -> Options:
    values = {
        "recipe": "distill", "tokens": 6 * 4 * LENGTH, "batch": 4, "micro": 3, "lr": 1e-2,
        "eval_every": 3, "eval_sequences": 2, "save_every": 2,
    }  # fmt: skip
    return Options.model_validate(values | changed)


def trained(folder: Path) -> list[float]:
    return [r["loss"] for r in read(folder / "healing" / "distill") if r["kind"] == "train"]


def test_all_of_the_vocabulary_is_a_loaded_teacher(
    model: Checkpoint, teacher: Checkpoint, store: Store, tmp_path: Path
) -> None:
    """But for the rounding to float16; rows and micro-batches go with their distributions."""
    cache = teach(teacher, store, tmp_path / "cache", top=260)
    heal(model, store, options(), tmp_path / "loaded", teacher=teacher)
    healed = heal(model, store, options(), tmp_path / "kept", cache=cache)
    assert trained(tmp_path / "kept") == pytest.approx(trained(tmp_path / "loaded"), rel=1e-3)
    assert len(trained(tmp_path / "kept")) == 6
    assert healed.model is not None
    manifest = json.loads((tmp_path / "kept" / "shearling.json").read_text())
    assert manifest["teacher"]["fingerprint"] == teacher.fingerprint
    assert manifest["teacher"]["cache"] == cache.fingerprint


def test_stopped_and_taken_up_again(
    model: Checkpoint, teacher: Checkpoint, store: Store, tmp_path: Path
) -> None:
    """To the same losses; not with another cache, nor with the teacher itself."""
    cache = teach(teacher, store, tmp_path / "cache", top=8)
    other = teach(teacher, store, tmp_path / "other", top=9)
    assert cache.fingerprint != other.fingerprint

    def stop(stage: str, done: float, total: float, /) -> None:
        if done == 3:
            raise _Killed

    heal(model, store, options(), tmp_path / "whole", cache=cache)
    with pytest.raises(_Killed):
        heal(model, store, options(), tmp_path / "parts", cache=cache, progress=stop)
    with pytest.raises(ShearlingError, match="a run with another cache"):
        heal(model, store, options(), tmp_path / "parts", cache=other)
    with pytest.raises(ShearlingError, match="a run with another teacher and cache"):
        heal(model, store, options(), tmp_path / "parts", teacher=teacher)
    heal(model, store, options(), tmp_path / "parts", cache=cache)
    assert trained(tmp_path / "parts") == trained(tmp_path / "whole")
    assert min(trained(tmp_path / "whole")) > 0


def test_what_does_not_go_together(
    model: Checkpoint, teacher: Checkpoint, store: Store, tmp_path: Path
) -> None:
    cache = teach(teacher, store, tmp_path / "cache", top=2)
    elsewhere = Path(shutil.copytree(store.path, tmp_path / "store"))
    manifest = (elsewhere / "store.json").read_text()
    (elsewhere / "store.json").write_text(manifest + "\n")
    cases: list[tuple[str, Options, Store, Checkpoint | None]] = [
        ("of another store", options(), Store.open(elsewhere), None),
        ("--recipe cpt learns from the text", options(recipe="cpt"), store, None),
        ("temperature=2 was given, .* temperature=1", options(temperature=2), store, None),
        ("hidden_share=0.5 was given", options(hidden_share=0.5), store, None),
        ("says, but --teacher flock is another model", options(), store, model),
    ]
    for message, given, data, wise in cases:
        with pytest.raises(ShearlingError, match=message):
            heal(model, data, given, tmp_path / "out", cache=cache, teacher=wise)
    cache = replace(cache, manifest=replace(cache.manifest, vocab=300))
    with pytest.raises(ShearlingError, match="knows 300 tokens and the model 260"):
        heal(model, store, options(), tmp_path / "out", cache=cache)
    assert not (tmp_path / "out").exists()
