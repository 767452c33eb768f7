"""The loop: batches in, an objective down, checkpoints and a log out; nothing knows of recipes.

A step is a function of the seed, the step's number and the state before it, so that a run that is
killed and taken up again, on as many ranks or on another number, gives the losses it would have
given (bit for bit on the same number of ranks on a CPU).

On a GPU nothing in a step waits for the device: the next batch is read and the next step told
while it computes, and a step's numbers are looked at one step later. No checkpoint is written, and
no held-out loss taken, before all of them have been.

Shapes: B sequences of a micro-batch, S positions.
"""

from __future__ import annotations

import gc
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shearling.data.seeds import folded
from shearling.data.store import IGNORED, Store
from shearling.data.teacher import Cache
from shearling.engine.products import fast_products
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.train import optimiser as optimisers
from shearling.train import saving
from shearling.train.batches import Batch, Reader
from shearling.train.device import numbers
from shearling.train.installed import check_shared
from shearling.train.log import Log, NoLog
from shearling.train.memory import MICRO_TOKENS
from shearling.train.mixture import Mixture
from shearling.train.objective import Objective
from shearling.train.options import Options
from shearling.train.parallel import World, reshard, sharded, whole
from shearling.train.readings import Reading
from shearling.train.schedule import factor
from shearling.train.stopping import terminated
from shearling.train.weights import Weights

STAGE = "training"


@dataclass(frozen=True)
class _Made:
    """A step that was told to the device, and what it is to be logged with."""

    step: int
    share: float
    domains: tuple[str, ...]
    reading: Reading


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
        micro: sequences in memory at a time; as many as options say, or a CPU likes, if not given.
            Halved where memory runs out.

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
    micro: int | None = None
    step: int = field(default=0, init=False)
    stopped: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        """Lay out the data and the optimiser; nothing is trained yet."""
        options, size = self.options, self.world.size
        check_shared(options.batch, size)
        sizes = {domain: len(self.store.sequences(domain)) for domain in self.store.domains}
        self.mixture = Mixture(sizes, seed=options.seed, batch=options.batch)
        self.steps = options.steps(self.store.length)
        self.optimiser = optimisers.build(self.objective, options, self.world)
        self._own = len(optimisers.groups(self.objective, options.weight_decay))
        self.micro = self.micro or options.micro or max(1, MICRO_TOKENS // self.store.length)
        self._reader = Reader(self.store, self.cache, self.world.device)
        self._log = NoLog()
        self._made: deque[_Made] = deque()
        self._behind = 1 if self.world.device.type == "cuda" else 0
        self._begun = time.perf_counter(), 0
        self._saved = -1
        self._found: tuple[int, dict[str, float]] | None = None

    def run(self) -> None:
        """Train to the end, or until SIGTERM; goes on from the newest checkpoint there is.

        Raises:
            ShearlingError: a checkpoint of another run, a loss that is not finite (the last good
                checkpoint is named), a full disk, or too little memory for one sequence;
                checkpoints before it are still there.
        """
        self._resume()
        if self.world.first:
            self._log = Log(self.folder, after=self.step, trackers=self.options.trackers)
        self._begun = time.perf_counter(), self.step
        try:
            with terminated() as stopping, fast_products():
                while self.step < self.steps:
                    self._look()
                    self.advance()
                    self.progress(STAGE, self.step, self.steps)
                    self.stopped = self.world.any(stopping())
                    if self.step % self.options.save_every == 0 or self.stopped:
                        self.save()
                    if self.stopped:
                        return
                self._look()
                self.save()
        except torch.OutOfMemoryError as error:
            raise self._too_large() from error
        finally:
            self._reader.close()
            self._log.close()

    def save(self) -> None:
        """Write a checkpoint, unless this step's is there."""
        self.settle()
        if self._saved == self.step:
            return
        self._judged()  # what is kept can be gone on with
        held = saving.tensors(self.objective, self.optimiser)
        state = {
            "identity": dict(self.identity),
            "mixture": self.mixture.state(),
            "weights": self.weights.state(),
        }
        saving.save(
            self.folder, self.step, held, state, self.world, keep=self.options.keep,
            every=self.options.save_every,
        )  # fmt: skip
        self._saved = self.step

    def losses(self) -> dict[str, float]:
        """Mean nats a token on the held-out part of each domain; gates, if any, without chance."""
        learner = self.objective.learner
        with nullcontext() if learner is None else learner.settled(self.step):
            losses = {domain: self._held_out(domain) for domain in self.store.domains}
        reshard(self.objective)  # or a checkpoint would be of what was gathered, without moments
        return losses

    def advance(self) -> None:
        """One update; its numbers are logged when they have arrived."""
        rows = self._rows()
        batch = self._reader.batch(rows[self.world.rank :: self.world.size])
        self._read_ahead()
        count = max(self.world.total(batch.counted), 1)
        learner = self.objective.learner
        total = self._gradients(batch, count)
        if learner is not None:
            learner.gather(self.step, self.world)
        norm = whole(optimisers.clip(self._trained(), self.options.clip))
        share = factor(self.step, self.steps, warmup=self.options.warmup, final=self.options.final)
        optimisers.set_rates(self.optimiser, share)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        values: dict[str, Any] = {"loss": self.world.summed(total) / count, "gradient_norm": norm}
        if learner is not None:
            learner.settle(self.step)
            values |= {"gates": learner.record(self.step), "largest": learner.largest()}
        domains = tuple(dict.fromkeys(domain for domain, _ in rows))
        self._made.append(_Made(self.step, share, domains, Reading(values)))
        self.settle(self._behind)

    def settle(self, behind: int = 0) -> None:
        """Look at the numbers of all steps made but the last ``behind``, and log them.

        Raises:
            ShearlingError: a loss or gradient that is not finite, gates that run away.
        """
        while len(self._made) > behind:
            made = self._made.popleft()
            values = made.reading.read()
            if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
                raise self._not_finite("the loss or its gradient", made.step, made.domains)
            if self.objective.learner is not None:
                self.objective.learner.check(values.pop("largest"))
            seconds, done = time.perf_counter() - self._begun[0], made.step - self._begun[1]
            again = {"resumed": True} if done == 1 and self._begun[1] else {}
            self._log.write(
                {
                    "kind": "train", "step": made.step, "tokens": self._tokens(made.step),
                    "lr": self.options.lr * made.share, **values, "seconds": round(seconds, 3),
                    "tokens_per_s": round(self._tokens(done) / seconds, 2), **again,
                }
            )  # fmt: skip

    def _resume(self) -> None:
        """Go on from the newest checkpoint that can be read; what is newer and damaged goes."""
        if self.world.first:
            saving.clear(self.folder)
        damaged: list[tuple[Path, ShearlingError]] = []
        for checkpoint in saving.newest_first(self.folder):
            error = self._resumed(checkpoint)
            if error is None:
                for path, why in damaged:
                    self.notify(
                        f"{path} is removed, and the run goes on from the one before: {why}"
                    )
                    saving.remove(path, self.world)
                self.notify(f"going on from step {self.step} of {self.steps} ({checkpoint}).")
                return
            damaged.append((checkpoint, error))
        if damaged:
            raise damaged[0][1]

    def _resumed(self, checkpoint: Path) -> ShearlingError | None:
        """Take a checkpoint's state; what is wrong with it, if a file of it is damaged.

        Ranks agree on it: where one cannot read its part, none goes on from it.
        """
        error: ShearlingError | None = None
        try:
            state = saving.read_state(checkpoint)
        except saving.DamagedCheckpoint as damage:
            error = damage
        if self.world.any(error is not None):
            return error or saving.DamagedCheckpoint(f"{checkpoint} is damaged for another rank.")
        differing = [k for k in self.identity if state.identity.get(k) != self.identity[k]]
        if differing:
            raise ShearlingError(
                f"{checkpoint} is of a run with another {' and '.join(differing)}; name a new "
                "output directory, or remove that one."
            )
        try:
            saving.load(checkpoint, saving.tensors(self.objective, self.optimiser), self.world)
        except saving.DamagedCheckpoint as damage:
            error = damage
        if self.world.any(error is not None):
            return error or saving.DamagedCheckpoint(f"{checkpoint} is damaged for another rank.")
        self.step = self._saved = state.step
        optimisers.go_on(self.optimiser, self.step)
        self.mixture.load(state.mixture)
        self.weights.load(state.weights)
        return None

    def _look(self) -> None:
        """Held-out losses where they are due, and what the mix makes of them."""
        update, last = self._updates(self.step), self.step == self.steps
        if not (update or last or self.step % self.options.eval_every == 0):
            return
        self.settle()
        losses = self._judged()
        if update and 0 < self.step < self.steps:
            self.weights.update(losses, self.step)
        self._log.write(
            {
                "kind": "eval", "step": self.step, "tokens": self._tokens(self.step),
                "losses": losses, "weights": dict(self.weights.current),
            }
        )  # fmt: skip

    def _judged(self) -> dict[str, float]:
        """Held-out losses of this step's weights, measured once.

        Raises:
            ShearlingError: one is not finite; it is named, and so is the last good checkpoint.
        """
        if self._found is None or self._found[0] != self.step:
            self._found = self.step, self.losses()
        losses = self._found[1]
        diverged = tuple(domain for domain, loss in losses.items() if not math.isfinite(loss))
        if diverged:
            raise self._not_finite("the held-out loss", self.step, diverged)
        return losses

    def _updates(self, step: int) -> bool:
        return self.options.mix == "dynamic" and step % self.options.update_every == 0

    def _rows(self) -> list[tuple[str, int]]:
        """The global batch of this step."""
        rows = self.mixture.next(self.weights.current)
        for notice in self.mixture.notices:
            self.notify(
                f"{notice.domain} is used up at step {notice.step}; its sequences come again, in "
                f"another order (epoch {notice.epoch})."
            )
        return rows

    def _read_ahead(self) -> None:
        """Have the next step's sequences read, unless the mix may change before it."""
        if self.step + 1 < self.steps and not self._updates(self.step + 1):
            rows = self.mixture.peek(self.weights.current)
            self._reader.read_ahead(rows[self.world.rank :: self.world.size])

    def _gradients(self, batch: Batch, count: float) -> Tensor:
        """The summed loss, and gradients; the step is begun anew where memory runs out."""
        while True:
            try:
                return self._accumulated(batch, count)
            except torch.OutOfMemoryError as error:
                if self.micro == 1 or self.world.size > 1:
                    raise self._too_large() from error
            self._halve()  # only here are the failed step's activations free

    def _accumulated(self, batch: Batch, count: float) -> Tensor:
        torch.manual_seed(_step_seed(self.options.seed, self.step, self.world.rank))
        if self.objective.learner is not None:
            self.objective.learner.draw(self.step)
        device, size = self.world.device, self.micro or 1
        total = torch.zeros((), dtype=torch.float64, device=device)
        for part in batch.micro(size, device):
            with self._precision():
                loss = self.objective(part.ids, part.labels, part.kept, counting=part.counting)
            # FSDP averages gradients over ranks; the sum over all tokens' is wanted.
            (loss * (self.world.size / count)).backward()
            total += loss.detach()
        return total

    def _halve(self) -> None:
        before = self.micro or 1
        self.micro = before // 2
        self.optimiser.zero_grad(set_to_none=True)
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        self.notify(
            f"memory ran out with {before} sequences at a time at step {self.step + 1}; the step "
            f"is made again with {self.micro}, and so is all that follows (micro={self.micro})."
        )

    def _held_out(self, domain: str) -> float:
        part = self.store.sequences(domain, "held_out")
        rows = list(range(min(len(part), self.options.eval_sequences)))
        mine = [(domain, row) for row in rows[self.world.rank :: self.world.size]]
        # Every rank runs as many micro-batches: sharded weights are gathered by all at once.
        each = -(-len(rows) // self.world.size)
        padding = each - len(mine)
        ids_NS, labels_NS = self._reader.read("held_out", mine + [(domain, 0)] * padding)
        if padding:
            labels_NS[-padding:] = IGNORED
        batch, device = Batch(ids_NS, labels_NS, None), self.world.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        with torch.no_grad():
            for micro in batch.micro(self.micro or 1, device):
                with self._precision():
                    total += self.objective(micro.ids, micro.labels, held_out=True)
        total = self.world.summed(total)
        return float(total) / max(1.0, self.world.total(batch.counted))

    def _trained(self) -> list[nn.Parameter]:
        return [p for group in self.optimiser.param_groups[: self._own] for p in group["params"]]

    def _tokens(self, step: int) -> int:
        return step * self.options.batch * self.store.length

    def _precision(self) -> AbstractContextManager[Any]:
        """Products in bfloat16 where float32 weights are not multiplied themselves.

        Entered for every forward pass: autocast keeps the casts of weights until it is left, and
        would go on with them after the optimiser has changed the weights. FSDP casts by itself.
        """
        device = self.world.device
        taken = numbers(self.options.dtype, self.options.weight_dtype, device)
        if not taken.autocast or sharded(self.objective):
            return nullcontext()
        return torch.autocast(device.type, taken.computed)

    def _not_finite(self, what: str, step: int, domains: tuple[str, ...]) -> ShearlingError:
        good = [path for path in saving.newest_first(self.folder) if saving.step_of(path) < step]
        kept = f"the last good state is {good[0]}" if good else "no checkpoint was due yet"
        return ShearlingError(
            f"{what} is not a finite number at step {step} (sequences of {', '.join(domains)}); "
            f"{kept}: lower lr, or look at that data, and start again."
        )

    def _too_large(self) -> ShearlingError:
        alone = "one sequence" if self.micro == 1 else f"{self.micro} sequences"
        return ShearlingError(
            f"memory ran out with {alone} of {self.store.length} tokens at a time; give "
            "checkpointing=true, a smaller micro, optimizer=adamw8bit with weight_dtype=bfloat16, "
            "or pack the text with a smaller --length."
        )


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Of what a step draws (dropout in adapters): a function of seed, step and rank alone."""
    return folded((seed * 1_000_003 + step) * 65_537 + rank)
