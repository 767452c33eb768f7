"""The loop: against a bare PyTorch loop, killed and taken up again, on one process and on two."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import naive
from process_work import heal_rank
from processes import ended, started
from shearling.data.store import Store
from shearling.data.teacher import Cache
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.train.heal import heal
from shearling.train.log import read
from shearling.train.loop import Trainer
from shearling.train.mixture import Mixture
from shearling.train.objective import Objective
from shearling.train.options import Options
from shearling.train.parallel import World
from shearling.train.schedule import factor
from shearling.train.teach import teach
from small_disk import files_of_at_most

STEPS, BATCH = 12, 6
LONG = 22  # steps of a run that is killed from outside
SHORT = {"tokens": 6 * BATCH * 24}  # half as many; a checkpoint after the fourth


def options(**changed: Any) -> Options:
    values = {
        "tokens": STEPS * BATCH * 24, "batch": BATCH, "micro": 2, "lr": 1e-2, "save_every": 4,
        "eval_every": 5, "eval_sequences": 3, "seed": 3,
    }  # fmt: skip
    return Options.model_validate(values | changed)


def trained(folder: Path) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["gradient_norm"]) for r in records(folder, "train")]


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [r for r in read(folder) if r["kind"] == kind]


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
            reference = dict.fromkeys(store.domains, 2.0) if given.mix == "dynamic" else None
            made[key] = tmp_path_factory.mktemp("whole") / "out"
            heal(model, store, given, made[key], reference=reference)
        return made[key]

    return run


def test_against_a_bare_loop(model: Checkpoint, store: Store, tmp_path: Path) -> None:
    """Whole batches, stock cross-entropy, torch's AdamW; weights after it as well."""
    healed = heal(model, store, options(clip=0.5), tmp_path / "out")
    bare = naive.stock(model.path).requires_grad_(True)
    decayed = [p for p in bare.parameters() if p.ndim > 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1},
         {"params": [p for p in bare.parameters() if p.ndim < 2], "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    sizes = {domain: len(store.sequences(domain)) for domain in store.domains}
    mixture = Mixture(sizes, seed=3, batch=BATCH)
    shares = {domain: size / sum(sizes.values()) for domain, size in sizes.items()}
    found = trained(tmp_path / "out" / "healing" / "cpt")
    assert len(found) == STEPS
    for step in range(STEPS):
        rows = mixture.next(shares)
        ids = torch.cat([store.sequences(domain)[[row]][0] for domain, row in rows])
        logits = bare(input_ids=ids, use_cache=False).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(bare.parameters(), 0.5)
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 * factor(step, STEPS, warmup=0.03, final=0.1)
        optimiser.step()
        optimiser.zero_grad()
        assert found[step][0] == step + 1
        assert found[step][1] == pytest.approx(loss.item(), rel=1e-4)
        assert found[step][2] == pytest.approx(norm.item(), rel=1e-3)
    assert healed.model is not None
    after = naive.stock(healed.model.path).state_dict()
    for name, tensor in bare.state_dict().items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-3, atol=1e-4)


def test_held_out_losses(model: Checkpoint, store: Store, whole: Callable[..., Path]) -> None:
    looks = records(whole() / "healing" / "cpt", "eval")
    assert [look["step"] for look in looks] == [0, 5, 10, 12]
    stock = naive.stock(model.path)
    for domain in store.domains:
        ids, _ = store.sequences(domain, "held_out")[[0, 1, 2]]
        with torch.no_grad():
            nll = naive.token_nll(stock, ids)
        assert looks[0]["losses"][domain] == pytest.approx(float(nll.mean()), rel=1e-5)
    assert sum(looks[-1]["losses"].values()) < sum(looks[0]["losses"].values())


@pytest.mark.parametrize("stop", [1, 4, 7, STEPS])
def test_stopped_and_taken_up_again(
    model: Checkpoint, store: Store, whole: Callable[..., Path], tmp_path: Path, stop: int
) -> None:
    """By SIGTERM at a step's end: the same losses and the same weights, bit for bit."""
    changed: dict[str, Any] = {"mix": "dynamic", "update_every": 3}
    given, outputs = options(**changed), (whole(**changed), tmp_path / "parts")
    reference = dict.fromkeys(store.domains, 2.0)

    def terminate(stage: str, done: float, total: float, /) -> None:
        if done == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    halted = heal(model, store, given, tmp_path / "parts", reference=reference, progress=terminate)
    assert halted.model is None
    assert halted.step == stop
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["healing"]
    told: list[str] = []
    resumed = heal(model, store, given, tmp_path / "parts", reference=reference, notify=told.append)
    assert any(f"going on from step {stop} of {STEPS}" in line for line in told)
    folders = [output / "healing" / "cpt" for output in outputs]
    assert trained(folders[0]) == trained(folders[1])
    assert len(trained(folders[0])) == STEPS
    one, other = (
        [(look["step"], look["losses"], look["weights"]) for look in records(folder, "eval")]
        for folder in folders
    )
    assert one == other
    assert one[-1][2] != one[0][2], "weights are to move"
    kept = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert kept[0] == kept[1]
    manifests = [json.loads((output / "shearling.json").read_text()) for output in outputs]
    assert manifests[0]["losses"] == manifests[1]["losses"]
    assert resumed.model is not None
    weights = [(output / "model.safetensors").read_bytes() for output in outputs]
    assert weights[0] == weights[1]


def test_killed_in_the_middle_of_a_checkpoint(
    model: Checkpoint, store: Store, whole: Callable[..., Path], tmp_path: Path
) -> None:
    """What a kill -9 leaves: half a checkpoint under another name, half a line in the log."""
    given = options()
    with pytest.raises(_Killed):
        heal(model, store, given, tmp_path / "parts", progress=_kill_at(7))
    folder = tmp_path / "parts" / "healing" / "cpt"
    assert sorted(p.name for p in folder.iterdir()) == ["log.jsonl", "step-00000004"]
    (folder / ".step-00000008.partial").mkdir()
    (folder / ".step-00000008.partial" / "shard.safetensors").write_text("half")
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"kind": "train", "st')
    heal(model, store, given, tmp_path / "parts")
    assert trained(folder) == trained(whole() / "healing" / "cpt")


def test_killed_from_outside(
    model: Checkpoint, teacher: Checkpoint, store: Store, tmp_path: Path
) -> None:
    """kill -9 at moments nobody chose, twice, a checkpoint after every step: the same losses."""
    given = options(tokens=LONG * BATCH * 24, save_every=1, mix="dynamic", update_every=7)
    reference = dict.fromkeys(store.domains, 2.0)
    heal(model, store, given, tmp_path / "whole", reference=reference)
    folder, draw = tmp_path / "parts" / "healing" / "cpt", random.Random()
    for until in (draw.randint(2, 5), draw.randint(8, 13)):
        (running,) = running_heal(1, model, teacher, store, tmp_path / "parts", given)
        while running.is_alive() and len(trained(folder)) < until:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.05))
        running.kill()
        running.join(timeout=60)
        assert running.exitcode == -signal.SIGKILL, "it ended before it was killed"
        assert until <= len(trained(folder)) < LONG
        assert not (tmp_path / "parts" / "config.json").exists()
    heal(model, store, given, tmp_path / "parts", reference=reference)
    assert trained(folder) == trained(tmp_path / "whole" / "healing" / "cpt")
    assert [step for step, *_ in trained(folder)] == list(range(1, LONG + 1))
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "parts")]
    assert weights[0] == weights[1]


def test_a_disk_that_runs_full(
    model: Checkpoint, store: Store, whole: Callable[..., Path], tmp_path: Path
) -> None:
    """At the second of three checkpoints, by the system's own doing; the first one counts."""
    given = options()
    with ExitStack() as limit:

        def fill(stage: str, done: float, total: float, /) -> None:
            if done == 6:
                limit.enter_context(files_of_at_most(100_000))

        with pytest.raises(ShearlingError) as full:
            heal(model, store, given, tmp_path / "parts", progress=fill)
    folder = tmp_path / "parts" / "healing" / "cpt"
    assert "the disk ran full while writing" in str(full.value)
    assert "step-00000008" in str(full.value)
    assert str(full.value).count(". ") == 0
    assert sorted(path.name for path in folder.iterdir()) == ["log.jsonl", "step-00000004"]
    assert len(trained(folder)) == 8
    heal(model, store, given, tmp_path / "parts")
    assert trained(folder) == trained(whole() / "healing" / "cpt")


class _Killed(Exception):
    pass


def _kill_at(step: int) -> Any:
    def progress(stage: str, done: float, total: float, /) -> None:
        if done == step:
            raise _Killed

    return progress


def test_a_loss_that_is_not_finite(model: Checkpoint, store: Store, tmp_path: Path) -> None:
    with pytest.raises(ShearlingError, match=r"not a finite number at step \d+ .*lower lr"):
        heal(model, store, options(lr=1e30, clip=1e9), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "healing"]


def test_a_model_that_diverged_is_not_handed_over(
    model: Checkpoint, store: Store, tmp_path: Path
) -> None:
    """The last step's weights are judged by held-out text alone."""
    given = options(tokens=BATCH * 24, lr=1e18, warmup=0.0, eval_every=50)
    with pytest.raises(ShearlingError, match=r"the held-out loss is not .* at step 1 .*lower lr"):
        heal(model, store, given, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["healing"]
    text = (tmp_path / "out" / "healing" / "cpt" / "log.jsonl").read_text()
    assert "NaN" not in text


def test_weights_that_diverged_are_not_kept(
    model: Checkpoint, store: Store, tmp_path: Path
) -> None:
    """No checkpoint holds them, and none is called good."""
    given = options(lr=1e18, warmup=0.0, eval_every=50, save_every=1)
    for _ in range(2):
        with pytest.raises(ShearlingError, match="no checkpoint was due yet"):
            heal(model, store, given, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("step-*"))


@pytest.mark.parametrize("changed", [{"lr": 1e-3}, {"seed": 4}, {"batch": 3}])
def test_a_checkpoint_of_another_run(
    model: Checkpoint, store: Store, tmp_path: Path, changed: dict[str, Any]
) -> None:
    with pytest.raises(_Killed):
        heal(model, store, options(), tmp_path / "out", progress=_kill_at(6))
    with pytest.raises(ShearlingError, match="a run with another options; name a new output"):
        heal(model, store, options(**changed), tmp_path / "out")


def test_a_checkpoint_of_another_model(
    model: Checkpoint, teacher: Checkpoint, store: Store, tmp_path: Path
) -> None:
    with pytest.raises(_Killed):
        heal(model, store, options(), tmp_path / "out", progress=_kill_at(6))
    with pytest.raises(ShearlingError, match="a run with another model"):
        heal(teacher, store, options(), tmp_path / "out")


def test_only_so_many_checkpoints_are_kept(model: Checkpoint, store: Store, tmp_path: Path) -> None:
    heal(model, store, options(save_every=2, keep=3), tmp_path / "out")
    found = sorted((tmp_path / "out" / "healing" / "cpt").glob("step-*"))
    assert [path.name for path in found] == [f"step-{step:08}" for step in (8, 10, 12)]


# --- what a GPU does otherwise -------------------------------------------------------------------


def test_numbers_read_one_step_late(
    model: Checkpoint, store: Store, whole: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As on a GPU: the same log, and a loss that is not finite is found before a checkpoint."""
    undelayed = whole()
    begin = Trainer.__post_init__

    def late(self: Trainer) -> None:
        begin(self)
        self._behind = 1

    monkeypatch.setattr(Trainer, "__post_init__", late)
    heal(model, store, options(), tmp_path / "late")
    now, later = (
        [(r["kind"], r["step"], r.get("loss"), r.get("losses")) for r in read(folder)]
        for folder in (out / "healing" / "cpt" for out in (undelayed, tmp_path / "late"))
    )
    assert now == later
    with pytest.raises(ShearlingError, match=r"not a finite number at step \d+ .*lower lr"):
        heal(model, store, options(lr=1e30, clip=1e9, save_every=1), tmp_path / "out")
    folder = tmp_path / "out" / "healing" / "cpt"
    assert all(math.isfinite(loss) for _, loss, _ in trained(folder))
    assert len(list(folder.glob("step-*"))) <= len(trained(folder))


def test_memory_that_runs_out(
    model: Checkpoint, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is made again with half as many sequences: as if these had been asked for."""
    heal(model, store, options(micro=1, **SHORT), tmp_path / "asked")
    stock, told = Objective.forward, []

    def small(self: Objective, ids_BS: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        found = stock(self, ids_BS, *rest, **named)
        if torch.is_grad_enabled() and len(ids_BS) > 1:
            raise torch.OutOfMemoryError("no more")
        return found

    monkeypatch.setattr(Objective, "forward", small)
    heal(model, store, options(micro=3, **SHORT), tmp_path / "found", notify=told.append)
    asked, found = (trained(tmp_path / n / "healing" / "cpt") for n in ("asked", "found"))
    assert asked == found
    assert [line for line in told if "memory ran out with 3 sequences" in line] == told
    assert len(told) == 1

    def none(self: Objective, *rest: Any, **named: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("no more")
        return stock(self, *rest, **named)

    monkeypatch.setattr(Objective, "forward", none)
    with pytest.raises(ShearlingError, match="one sequence of 24 tokens at a time; give"):
        heal(model, store, options(), tmp_path / "none")


def test_eight_bits_taken_up_again(
    model: Checkpoint, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """adamw8bit in bfloat16 weights: it learns, and its moments are in the checkpoint."""
    pytest.importorskip("torchao")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    given = options(optimizer="adamw8bit", weight_dtype="bfloat16", lr=1e-2)
    heal(model, store, given, tmp_path / "whole")
    looks = records(tmp_path / "whole" / "healing" / "cpt", "eval")
    assert sum(looks[-1]["losses"].values()) < sum(looks[0]["losses"].values())
    with pytest.raises(_Killed):
        heal(model, store, given, tmp_path / "parts", progress=_kill_at(6))
    heal(model, store, given, tmp_path / "parts")
    whole, parts = (trained(tmp_path / n / "healing" / "cpt") for n in ("whole", "parts"))
    assert [loss for _, loss, _ in parts] == pytest.approx([loss for _, loss, _ in whole], rel=1e-2)
    assert parts[:5] == whole[:5]


def test_bfloat16_trains_the_weights_it_multiplies(whole: Callable[..., Path]) -> None:
    """Autocast must not go on with casts of weights that have changed: near the float32 run."""
    outputs = (whole(), whole(dtype="bfloat16"))
    full, half = (trained(output / "healing" / "cpt") for output in outputs)
    assert full[-1][1] < full[0][1] - 0.1
    assert [x for _, x, _ in half] == pytest.approx([x for _, x, _ in full], rel=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["cpt", "lora", "distill"])
def test_a_gpu_heals_as_a_cpu_does(
    model: Checkpoint, teacher: Checkpoint, store: Store, tmp_path: Path, recipe: str
) -> None:
    wise = teacher if recipe == "distill" else None
    given = options(recipe=recipe, dtype="float32", checkpointing=False)
    heal(model, store, given, tmp_path / "cpu", teacher=wise)
    world = World(device=torch.device("cuda", 0))
    heal(model, store, given, tmp_path / "gpu", teacher=wise, world=world)
    cpu, gpu = (trained(tmp_path / n / "healing" / recipe) for n in ("cpu", "gpu"))
    assert [x for _, x, _ in gpu] == pytest.approx([x for _, x, _ in cpu], rel=1e-3)
    half = options(recipe=recipe, micro=None)
    heal(model, store, half, tmp_path / "half", teacher=wise, world=world)
    found = trained(tmp_path / "half" / "healing" / recipe)
    assert [x for _, x, _ in found] == pytest.approx([x for _, x, _ in cpu], rel=5e-2)


# --- several processes ---------------------------------------------------------------------------


def launch(
    processes: int, model: Checkpoint, teacher: Checkpoint | Cache, store: Store, output: Path,
    given: Options, *, kill: int = -1,
) -> int:  # fmt: skip
    """Healing by some processes: the largest of their exit codes."""
    running = running_heal(processes, model, teacher, store, output, given, kill=kill)
    return max(map(abs, ended(running, output.with_suffix(".said"), fails=kill >= 0)))


def running_heal(
    processes: int, model: Checkpoint, teacher: Checkpoint | Cache, store: Store, output: Path,
    given: Options, *, kill: int = -1,
) -> list[BaseProcess]:  # fmt: skip
    kept = isinstance(teacher, Cache)
    wise = teacher.path if given.recipe == "distill" and not kept else None
    return started(
        heal_rank, model.path, wise, teacher.path if kept else None, store.path, output,
        given.model_dump_json(), kill, ranks=processes, said=output.with_suffix(".said"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def by_two(
    model: Checkpoint, teacher: Checkpoint, store: Store, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What two processes make that nobody disturbs."""
    output = tmp_path_factory.mktemp("undisturbed") / "two"
    launch(2, model, teacher, store, output, options())
    return output


@pytest.mark.parametrize(
    ("recipe", "kept"), [("cpt", False), ("lora", False), ("distill", False), ("distill", True)]
)
def test_two_processes_are_one(
    request: pytest.FixtureRequest, model: Checkpoint, teacher: Checkpoint, store: Store,
    whole: Callable[..., Path], tmp_path: Path, recipe: str, kept: bool,
) -> None:  # fmt: skip
    given = options(recipe=recipe, **({} if recipe == "cpt" else SHORT))
    wise = teacher if recipe == "distill" and not kept else None
    cache = teach(teacher, store, tmp_path / "cache", top=9) if kept else None
    if recipe == "cpt":
        outputs = [whole(), request.getfixturevalue("by_two")]
    else:
        outputs = [tmp_path / "one", tmp_path / "two"]
        heal(model, store, given, outputs[0], teacher=wise, cache=cache)
        launch(2, model, cache or teacher, store, outputs[1], given)
    folders = [output / "healing" / recipe for output in outputs]
    alone, together = trained(folders[0]), trained(folders[1])
    assert len(alone) == len(together) == (STEPS if recipe == "cpt" else STEPS // 2)
    for (step, loss, _), (other_step, other, _) in zip(alone, together, strict=True):
        assert step == other_step
        assert other == pytest.approx(loss, rel=1e-5)
    losses = [records(folder, "eval")[-1]["losses"] for folder in folders]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    after = [naive.stock(output).state_dict() for output in outputs]
    for name, tensor in after[0].items():
        torch.testing.assert_close(after[1][name], tensor, rtol=2e-3, atol=2e-3)


def test_two_are_killed_and_go_on_as_two_or_one(
    model: Checkpoint, teacher: Checkpoint, store: Store, by_two: Path, tmp_path: Path
) -> None:
    """kill -9 of both after step 6: bit for bit as two, and within rounding as one."""
    given = options()
    assert launch(2, model, teacher, store, tmp_path / "two", given, kill=6)
    assert not (tmp_path / "two" / "config.json").exists()
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    launch(2, model, teacher, store, tmp_path / "two", given)
    heal(model, store, given, tmp_path / "one")
    whole, two, one = (
        trained(output / "healing" / "cpt")
        for output in (by_two, tmp_path / "two", tmp_path / "one")
    )
    assert two == whole
    assert [step for step, *_ in one] == [step for step, *_ in whole]
    assert [loss for _, loss, _ in one] == pytest.approx([x for _, x, _ in whole], rel=1e-5)


def test_batches_that_ranks_cannot_share(model: Checkpoint, store: Store, tmp_path: Path) -> None:
    with pytest.raises(ShearlingError, match="batch of 6 .* 4 ranks; give batch=8"):
        heal(model, store, options(), tmp_path / "out", world=World(size=4))


def test_the_log_is_json(whole: Callable[..., Path]) -> None:
    lines = (whole() / "healing" / "cpt" / "log.jsonl").read_text().splitlines()
    first = json.loads(lines[1])
    assert set(first) == {
        "kind", "step", "tokens", "loss", "gradient_norm", "lr", "seconds", "tokens_per_s",
    }  # fmt: skip
    assert first["tokens"] == BATCH * 24


@pytest.mark.parametrize("damage", ["state is gone", "state is cut off", "weights are cut off"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    model: Checkpoint, store: Store, whole: Callable[..., Path], tmp_path: Path, damage: str
) -> None:
    """The run goes on from the one before, says so, and ends as an undisturbed one does."""
    changed: dict[str, Any] = {"save_every": 4, "keep": 2}
    run, undisturbed, out = options(**changed), whole(**changed), tmp_path / "out"
    shutil.copytree(undisturbed / "healing", out / "healing")
    newest = sorted((out / "healing" / "cpt").glob("step-*"))[-1]
    file = newest / "state.json"
    if damage.startswith("weights"):
        file = next(newest.glob("*.safetensors"))
    content = file.read_bytes()
    file.unlink()
    if not damage.endswith("gone"):
        file.write_bytes(content[: len(content) // 2])
    notices: list[str] = []
    again = heal(model, store, run, out, notify=notices.append)
    assert any(str(newest) in told and "goes on from the one before" in told for told in notices)
    assert any("going on from step 8 of 12" in told for told in notices)
    assert again.model is not None
    assert again.model.fingerprint == Checkpoint.open(undisturbed).fingerprint


def test_where_no_checkpoint_is_whole(
    model: Checkpoint, store: Store, whole: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(whole() / "healing", tmp_path / "out" / "healing")
    for state in (tmp_path / "out").rglob("state.json"):
        state.write_text("{")
    with pytest.raises(ShearlingError, match="step-00000012 is not a whole checkpoint"):
        heal(model, store, options(), tmp_path / "out")
