"""The loop: batches in, an objective down, checkpoints and a log out; nothing knows of recipes.

A step is a function of the seed, the step's number and the state before it, so that a run that is
killed and taken up again, on as many ranks or on another number, gives the losses it would have
given (bit for bit on the same number of ranks on a CPU).

Shapes: B sequences of a micro-batch, S positions.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shearling.data.seeds import folded
from shearling.data.store import IGNORED, Store
from shearling.data.teacher import Cache, Kept
from shearling.engine.products import fast_products
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.train import saving
from shearling.train.log import Log
from shearling.train.mixture import Mixture
from shearling.train.objective import Objective, counted
from shearling.train.options import Options
from shearling.train.parallel import World, sharded, whole
from shearling.train.schedule import factor
from shearling.train.weights import Weights

STAGE = "training"
MICRO_TOKENS = 2048  # in memory at a time, unless the user says


@dataclass
class Trainer:
    """One phase of healing: a model, an objective, a stream of batches.

    Attributes:
        objective: gives the sum of the loss over a micro-batch; holds the model.
        store, options: data, and what was asked for.
        weights: of the domains; their updates follow the held-out losses.
        folder: where checkpoints and the log go.
        identity: what a checkpoint must agree on to be gone on with.
        world: ranks.
        progress, notify: told how far the run is; told what a user should know.
        cache: what an absent teacher said of the store's tokens.

    Where the objective holds a learner of gates, it is told when a step begins and ends; its
    parameters have learning rates of their own, on the same schedule, and are not clipped.
    """

    objective: Objective
    store: Store
    options: Options
    weights: Weights
    folder: Path
    identity: Mapping[str, Any]
    world: World
    progress: Progress = silent
    notify: Callable[[str], None] = lambda message: None
    cache: Cache | None = None
    step: int = field(default=0, init=False)
    stopped: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        """Lay out the data and the optimiser; nothing is trained yet."""
        if self.options.batch % self.world.size:
            raise ShearlingError(
                f"a batch of {self.options.batch} sequences cannot be split over "
                f"{self.world.size} ranks; give batch={_next(self.options.batch, self.world.size)}."
            )
        sizes = {domain: len(self.store.sequences(domain)) for domain in self.store.domains}
        self.mixture = Mixture(sizes, seed=self.options.seed, batch=self.options.batch)
        self.steps = self.options.steps(self.store.length)
        own, learner = groups(self.objective, self.options.weight_decay), self.objective.learner
        self._own = len(own)
        self.optimiser = torch.optim.AdamW(
            [*own, *(learner.groups() if learner else ())], lr=self.options.lr,
            betas=self.options.betas, eps=self.options.eps,
        )  # fmt: skip
        for group in self.optimiser.param_groups:
            group["peak"] = group["lr"]
        self._saved = -1

    def run(self) -> None:
        """Train to the end, or until SIGTERM; goes on from the newest checkpoint there is.

        Raises:
            ShearlingError: a checkpoint of another run, a loss that is not finite (the last good
                checkpoint is named), or a full disk; checkpoints before it are still there.
        """
        self._resume()
        log = self._open_log()
        started, before = time.perf_counter(), self.step
        try:
            with _terminated() as stopping, self._fast():
                while self.step < self.steps:
                    self._look(log)
                    log.write(self._train() | self._speed(started, before))
                    self.progress(STAGE, self.step, self.steps)
                    self.stopped = self.world.any(stopping())
                    if self.step % self.options.save_every == 0 or self.stopped:
                        self.save()
                    if self.stopped:
                        return
                self._look(log)
                self.save()
        finally:
            log.close()

    def save(self) -> None:
        """Write a checkpoint, unless this step's is there."""
        if self._saved == self.step:
            return
        held = saving.tensors(self.objective, self.optimiser)
        state = {
            "identity": dict(self.identity),
            "mixture": self.mixture.state(),
            "weights": self.weights.state(),
        }
        saving.save(self.folder, self.step, held, state, self.world, keep=self.options.keep)
        self._saved = self.step

    def losses(self) -> dict[str, float]:
        """Mean nats a token on the held-out part of each domain; gates, if any, without chance."""
        learner = self.objective.learner
        with nullcontext() if learner is None else learner.settled(self.step):
            return {domain: self._held_out(domain) for domain in self.store.domains}

    def _resume(self) -> None:
        newest = saving.last(self.folder)
        if newest is None:
            return
        state = saving.read_state(newest)
        differing = [k for k in self.identity if state["identity"].get(k) != self.identity[k]]
        if differing:
            raise ShearlingError(
                f"{newest} is of a run with another {' and '.join(differing)}; name a new output "
                "directory, or remove that one."
            )
        held = saving.tensors(self.objective, self.optimiser)
        saving.load(newest, held, self.world)
        self.step = self._saved = int(state["step"])
        for group in self.optimiser.param_groups:
            for parameter in group["params"]:
                self.optimiser.state[parameter]["step"] = torch.tensor(float(self.step))
        self.mixture.load(state["mixture"])
        self.weights.load(state["weights"])
        self.notify(f"going on from step {self.step} of {self.steps} ({newest}).")

    def _open_log(self) -> Log:
        if self.world.first:
            return Log(self.folder, after=self.step, trackers=self.options.trackers)
        return _Silent()

    def _look(self, log: Log) -> None:
        """Held-out losses where they are due, and what the mix makes of them."""
        update = self.options.mix == "dynamic" and self.step % self.options.update_every == 0
        last = self.step == self.steps
        if not (update or last or self.step % self.options.eval_every == 0):
            return
        losses = self.losses()
        if update and 0 < self.step < self.steps:
            self.weights.update(losses, self.step)
        log.write(
            {
                "kind": "eval", "step": self.step, "tokens": self._tokens(self.step),
                "losses": losses, "weights": dict(self.weights.current),
            }
        )  # fmt: skip

    def _train(self) -> dict[str, Any]:
        """One update; what the log is to hold of it."""
        rows = self.mixture.next(self.weights.current)
        for notice in self.mixture.notices:
            self.notify(
                f"{notice.domain} is used up at step {notice.step}; its sequences come again, in "
                f"another order (epoch {notice.epoch})."
            )
        mine = rows[self.world.rank :: self.world.size]
        ids_NS, labels_NS = self._read("train", mine)
        torch.manual_seed(_step_seed(self.options.seed, self.step, self.world.rank))
        learner = self.objective.learner
        if learner is not None:
            learner.draw(self.step)
        count = self.world.total(counted(labels_NS))
        total = 0.0
        first = 0
        for ids_BS, labels_BS in self._micro(ids_NS, labels_NS):
            kept = self._kept(mine[first : first + len(ids_BS)])
            first += len(ids_BS)
            loss = self.objective(ids_BS, labels_BS, kept)
            # FSDP averages gradients over ranks; the sum over all tokens' is wanted.
            (loss * (self.world.size / max(count, 1))).backward()
            total += float(loss.detach())
        if learner is not None:
            learner.gather(self.step, self.world)
        mean = self.world.total(total) / max(count, 1)
        norm = nn.utils.clip_grad_norm_(self._trained(), self.options.clip)
        norm = float(whole(norm))
        if not (math.isfinite(mean) and math.isfinite(norm)):
            raise self._not_finite(rows)
        share = factor(self.step, self.steps, warmup=self.options.warmup, final=self.options.final)
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * share
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        if learner is not None:
            learner.settle(self.step)
        return {
            "kind": "train", "step": self.step, "tokens": self._tokens(self.step), "loss": mean,
            "gradient_norm": norm, "lr": self.options.lr * share,
            **({} if learner is None else {"gates": learner.record(self.step)}),
        }  # fmt: skip

    def _held_out(self, domain: str) -> float:
        part = self.store.sequences(domain, "held_out")
        rows = list(range(min(len(part), self.options.eval_sequences)))
        mine = [(domain, row) for row in rows[self.world.rank :: self.world.size]]
        # Every rank runs as many micro-batches: sharded weights are gathered by all at once.
        each = -(-len(rows) // self.world.size)
        padding = each - len(mine)
        ids_NS, labels_NS = self._read("held_out", mine + [(domain, 0)] * padding)
        if padding:
            labels_NS[-padding:] = IGNORED
        total = 0.0
        with torch.no_grad():
            for ids_BS, labels_BS in self._micro(ids_NS, labels_NS):
                total += float(self.objective(ids_BS, labels_BS, held_out=True))
        return self.world.total(total) / max(1.0, self.world.total(counted(labels_NS)))

    def _read(self, part: str, rows: Sequence[tuple[str, int]]) -> tuple[Tensor, Tensor]:
        """Tokens and labels (N, S) in the order of ``rows``; each domain is read once."""
        ids_NS = torch.empty(len(rows), self.store.length, dtype=torch.long)
        labels_NS = torch.empty_like(ids_NS)
        for domain in dict.fromkeys(domain for domain, _ in rows):
            places = [i for i, (name, _) in enumerate(rows) if name == domain]
            found = self.store.sequences(domain, part)[[rows[i][1] for i in places]]
            ids_NS[places], labels_NS[places] = found
        return ids_NS, labels_NS

    def _kept(self, rows: Sequence[tuple[str, int]]) -> Kept | None:
        return None if self.cache is None else self.cache.read(rows).to(self.world.device)

    def _micro(self, ids_NS: Tensor, labels_NS: Tensor) -> list[tuple[Tensor, Tensor]]:
        size = self.options.micro or max(1, MICRO_TOKENS // self.store.length)
        device = self.world.device
        return [
            (ids_BS.to(device), labels_BS.to(device))
            for ids_BS, labels_BS in zip(ids_NS.split(size), labels_NS.split(size), strict=True)
        ]

    def _trained(self) -> list[nn.Parameter]:
        return [p for group in self.optimiser.param_groups[: self._own] for p in group["params"]]

    def _tokens(self, step: int) -> int:
        return step * self.options.batch * self.store.length

    def _speed(self, started: float, before: int) -> dict[str, float]:
        seconds = time.perf_counter() - started
        done = self._tokens(self.step) - self._tokens(before)
        return {"seconds": round(seconds, 3), "tokens_per_s": round(done / seconds, 2)}

    @contextmanager
    def _fast(self) -> Generator[None]:
        """Faster products on a CPU; on one GPU, bfloat16 (FSDP casts by itself)."""
        bf16 = self.options.dtype == "bfloat16" or (
            self.options.dtype == "auto" and self.world.device.type == "cuda"
        )
        plain = not sharded(self.objective)
        with (
            fast_products(),
            torch.autocast(self.world.device.type, torch.bfloat16, enabled=bf16 and plain),
        ):
            yield

    def _not_finite(self, rows: Sequence[tuple[str, int]]) -> ShearlingError:
        newest = saving.last(self.folder)
        domains = ", ".join(dict.fromkeys(domain for domain, _ in rows))
        kept = f"the last good state is {newest}" if newest else "no checkpoint was due yet"
        return ShearlingError(
            f"the loss or its gradient is not a finite number at step {self.step + 1} (sequences "
            f"of {domains}); {kept}: lower lr, or look at that data, and start again."
        )


class _Silent(Log):
    """The log of ranks that write none."""

    def __init__(self) -> None:
        pass

    def write(self, record: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


def groups(module: nn.Module, decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: decay on matrices alone, none on norms' gains and biases; gates apart."""
    learner = module.get_submodule("learner") if getattr(module, "learner", None) else None
    others = set() if learner is None else set(learner.parameters())
    trained = [p for p in module.parameters() if p.requires_grad and p not in others]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim < 2]
    found = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in found if group["params"]]


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Of what a step draws (dropout in adapters): a function of seed, step and rank alone."""
    return folded((seed * 1_000_003 + step) * 65_537 + rank)


def _next(batch: int, size: int) -> int:
    return -(-batch // size) * size


@contextmanager
def _terminated() -> Generator[Callable[[], bool]]:
    """Whether SIGTERM has come since; a run then ends at a step's end, saved."""
    came = False

    def note(*_: object) -> None:
        nonlocal came
        came = True

    try:
        before = signal.signal(signal.SIGTERM, note)
    except ValueError:  # not the main thread: whoever runs us sees to signals
        yield lambda: False
        return
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGTERM, before)
