"""What processes of :mod:`processes` do; imported once, by the server that forks them."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft  # noqa: F401 - what the work imports only as it goes on: 4 s in every process
import torch
from transformers.models.llama import modeling_llama  # noqa: F401

from shearling.cli import app
from shearling.data.pack import PackPlan, pack
from shearling.data.store import Store
from shearling.data.teacher import Cache
from shearling.engine.place import Place, Wish
from shearling.engine.ranks import Ranks, join_ranks, leave
from shearling.engine.stream import BlockStream
from shearling.gates.learn import learn
from shearling.gates.options import LearnOptions
from shearling.model.checkpoint import Checkpoint
from shearling.recipes.read import read_recipe
from shearling.recipes.run import RecipeRun
from shearling.repair.experts import ExpertOptions
from shearling.repair.refit import refit
from shearling.scoring.score import score_tokens
from shearling.scoring.score_units import score_units
from shearling.table.values import Keep
from shearling.train.heal import heal
from shearling.train.options import Options
from shearling.train.parallel import join
from shearling.train.reference import measure
from shearling.train.teach import teach

IMPORTED_BY = os.getpid()  # the server's, not that of a process which would have to import it all


def heal_rank(
    model: Path, teacher: Path | None, cache: Path | None, store: Path, output: Path, options: str,
    kill: int,
) -> None:  # fmt: skip
    """Heal as one rank of a group; killed after the step ``kill``, if there is such a step."""
    torch.set_num_threads(1)
    given, world, packed = Options.model_validate_json(options), join(), Store.open(store)

    def progress(stage: str, done: float, total: float, /) -> None:
        if done == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    heal(
        Checkpoint.open(model), packed, given, output,
        teacher=Checkpoint.open(teacher) if teacher else None,
        cache=Cache.open(cache) if cache else None,
        reference=dict.fromkeys(packed.domains, 2.0) if given.mix == "dynamic" else None,
        world=world, progress=progress,
    )  # fmt: skip
    leave()


def learn_rank(
    model: Path, sizes: dict[str, int], store: Path, output: Path, options: str, kill: int
) -> None:
    """Learn gates as one rank of a group; killed after the step ``kill`` of the training."""
    torch.set_num_threads(1)
    checkpoint, world = Checkpoint.open(model), join()

    def progress(stage: str, done: float, total: float, /) -> None:
        if stage == "training" and done == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    given = LearnOptions.model_validate_json(options)
    after = checkpoint.shape.with_(**sizes)
    learn(checkpoint, after, Store.open(store), given, output, world=world, progress=progress)
    leave()


def killed_pack(
    plan: PackPlan, output: Path, workers: int, shard_bytes: int, stage: str, share: float
) -> None:
    """Pack, and be killed once more than a share of a stage is done."""

    def progress(at: str, done: float, total: float, /) -> None:
        if at == stage and done > share * total:
            os.kill(os.getpid(), signal.SIGKILL)

    pack(plan, output, workers=workers, shard_bytes=shard_bytes, progress=progress)


def die(*_: object) -> None:
    """What becomes of a worker for which memory is wanting."""
    os._exit(9)


def import_everything() -> None:
    """Import the package and modules that names of its API are taken for, anew."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "shearling"]:
        del sys.modules[name]
    package = importlib.import_module("shearling")
    for module in ("pruning.prune", "pruning.cut", "scoring"):
        importlib.import_module(f"shearling.{module}")
    for name in package.__all__:
        assert name == "__version__" or callable(getattr(package, name)), name


# What walks are compared on: an odd number of sequences, in batches of two, so that the shares of
# processes differ.
BLOCKS = ("repair", "perplexity", "influence", "taylor")
UNITS = ("fisher-energy", "obs", "taylor", "activation")
AXES = ("mlp", "heads", "hidden")
SEQUENCES, LENGTH, BATCH_TOKENS = 9, 17, 34


def tokens(sequences: int = SEQUENCES) -> torch.Tensor:
    return torch.randint(3, 259, (sequences, LENGTH), generator=torch.Generator().manual_seed(4))


def everything(model: str, store: str, output: Path, ranks: Ranks) -> dict[str, Any]:
    """What the walks find, in JSON; ``output`` gets a teacher's cache."""
    checkpoint, packed = Checkpoint.open(model), Store.open(store)
    place = Place.best(checkpoint, Wish(device="cpu", ranks=ranks))
    place = replace(place, batch_tokens=BATCH_TOKENS)
    stream, found = BlockStream(checkpoint, place), {}
    for by in BLOCKS:
        scored = score_tokens(stream, by, tokens(), remove=2)
        found[by] = [*scored.values, *scored.order]
    for by in UNITS:
        units = score_units(stream, by, tokens(), AXES)
        found[f"{by} of units"] = {axis: scored.rows for axis, scored in units.items()}
    # Fewer sequences than processes: each runs them all.
    found["one sequence"] = score_tokens(stream, "perplexity", tokens(1)).values
    found["reference"] = measure(checkpoint, packed, 3, place=place)
    teach(checkpoint, packed, output / "cache", top=5, place=place)
    return found


def merged(model: str, solved: Path, ranks: Ranks) -> list[float]:
    """What experts lack when others were folded into them; each rank reads tokens of its own."""
    checkpoint = Checkpoint.open(model)
    place = Place.best(checkpoint, Wish(device="cpu", ranks=ranks))
    stream = BlockStream(checkpoint, replace(place, batch_tokens=BATCH_TOKENS))
    keep = Keep(blocks={"experts": ((0, 2),) * checkpoint.shape["layers"]})
    repair = refit(stream, keep, tokens() % 101, solved, experts=ExpertOptions(merge=True))
    return [step.error_before for step in repair.steps]


def walk_rank(model: str, store: str, output: str, arguments: list[str]) -> None:
    """As one rank of a group, write down what the walks find; then run a command."""
    torch.set_num_threads(1)
    ranks = join_ranks("cpu")
    walked = everything(model, store, Path(output), ranks)
    Path(output, f"{ranks.rank}.json").write_text(json.dumps(walked))
    sums = merged(str(Path(output).parent / "mixture"), Path(output) / "solved", ranks)
    Path(output, f"{ranks.rank}-merged.json").write_text(json.dumps(sums))
    # The command goes on with this group: a second one at the same address would wait for ever.
    with Path(output, f"{ranks.rank}.txt").open("w") as said, redirect_stdout(said):
        app(arguments, standalone_mode=False)


def killed_recipe(pairs: list[str], changes: dict[str, str], output: Path, stage: str) -> None:
    """Run the laptop recipe; killed in a stage, in a training after its fourth step."""
    torch.set_num_threads(1)

    def progress(said: str, done: float, total: float, /) -> None:
        if said.startswith(f"{stage}: ") and (done == 4 or "training" not in said):
            os.kill(os.getpid(), signal.SIGKILL)

    def notify(sentence: str) -> None:
        if sentence.startswith(stage) and stage.endswith(("text", "report")):  # of no progress
            os.kill(os.getpid(), signal.SIGKILL)

    RecipeRun(read_recipe("laptop", pairs, changes), output, progress, notify).run()
