"""From a model, a store and options to a trainer: what is refused, loaded, sharded and laid out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed

from shearling.data.store import Store
from shearling.data.teacher import Cache
from shearling.engine.products import fast_products
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, processes, silent
from shearling.files.staging import check_writable
from shearling.files.unfinished import alone
from shearling.files.writer import check_outside
from shearling.model.checkpoint import Checkpoint
from shearling.model.lineage import blocks_in
from shearling.train import adapters
from shearling.train import weights as mixes
from shearling.train.build import blocks, empty, fill, loaded
from shearling.train.device import Numbers, numbers
from shearling.train.estimate import check_host_memory
from shearling.train.finish import RUN
from shearling.train.installed import check_installed
from shearling.train.loop import Trainer
from shearling.train.memory import Fit, MemoryBudget, fit, free_on_gpu
from shearling.train.objective import Distillation, Objective, TrainedGates
from shearling.train.options import Options
from shearling.train.parallel import World, shard

_ALONE = World()
# Options that two runs need not share for one to go on with the other's checkpoint.
FREE = (
    "save_every", "keep", "eval_every", "eval_sequences", "micro", "checkpointing", "trackers",
)  # fmt: skip


@dataclass(frozen=True)
class Training:
    """What a training run is given.

    Attributes:
        source: the model; never written to.
        store: packed text of the same tokenizer.
        options: the recipe and its numbers.
        teacher: the model whose distribution is learned, where the recipe is ``distill``.
        cache: what a teacher said of the store, instead of the teacher itself.
        reference: domain -> reference loss (nats), for a dynamic mix.
        world: ranks.
        progress, notify: told how far the run is; told what a user should know.
    """

    source: Checkpoint
    store: Store
    options: Options
    teacher: Checkpoint | None = None
    cache: Cache | None = None
    reference: Mapping[str, float] | None = None
    world: World = _ALONE
    progress: Progress = silent
    notify: Callable[[str], None] = lambda message: None

    @property
    def numbers(self) -> Numbers:
        """What is computed in and kept."""
        return numbers(self.options.dtype, self.options.weight_dtype, self.world.device)

    @property
    def present(self) -> Checkpoint | None:
        """The teacher, where it is to be in memory."""
        absent = self.options.recipe != "distill" or self.cache is not None
        return None if absent else self.teacher


def check(training: Training, output: Path, run: str = RUN) -> None:
    """Refuse what cannot work before anything is loaded (ShearlingError)."""
    source, store, options = training.source, training.store, training.options
    check_installed(options, max(training.world.size, processes()))
    store.check_tokenizer(source.path, options.bos)
    check_output(output, run)
    for model in (source, training.teacher):
        if model is not None:
            check_outside(output, model.path)
    if training.cache is not None:
        _check_cache(training.cache, source, store, options, training.teacher)
    elif options.recipe == "distill":
        _check_teacher(training)
    if options.mix == "dynamic" and training.reference is None:
        raise ShearlingError(
            "mix=dynamic follows losses over a reference; give --reference FILE (`shearling "
            "reference` makes one), or a --teacher to measure it on."
        )
    mixed(store, options, training.reference)
    for domain in store.domains:
        if not len(store.sequences(domain, "held_out")):
            raise ShearlingError(
                f"{domain} in {store.path} has nothing held out, by which healing is judged; pack "
                "the text with a larger --held-out, or with more documents."
            )
    limit = getattr(source.config, "max_position_embeddings", None)
    if limit is not None and store.length > limit:
        raise ShearlingError(
            f"sequences of {store.length} tokens are longer than the {limit} positions of "
            f"{source.name}; pack the text with --length {limit}."
        )


def _check_teacher(training: Training) -> None:
    source, teacher = training.source, training.teacher
    if teacher is None:
        raise ShearlingError(
            "--recipe distill learns from a model; give --teacher SOURCE, or --teacher-cache."
        )
    if teacher.shape["vocab"] != source.shape["vocab"]:
        raise ShearlingError(
            f"the teacher knows {teacher.shape['vocab']} tokens and the model "
            f"{source.shape['vocab']}; distillation needs one vocabulary, so use --recipe cpt."
        )
    if training.options.hidden_share and teacher.shape["hidden"] != source.shape["hidden"]:
        raise ShearlingError(
            f"hidden_share was given, but the teacher is {teacher.shape['hidden']} wide and "
            f"the model {source.shape['hidden']}; leave it out."
        )


def _check_cache(
    cache: Cache, source: Checkpoint, store: Store, options: Options, teacher: Checkpoint | None
) -> None:
    if options.recipe != "distill":
        raise ShearlingError(
            f"--teacher-cache was given, but --recipe {options.recipe} learns from the text; leave "
            "it out, or use --recipe distill."
        )
    cache.check_store(store)
    if cache.vocab != source.shape["vocab"]:
        raise ShearlingError(
            f"the teacher behind {cache.path} knows {cache.vocab} tokens and the model "
            f"{source.shape['vocab']}; distillation needs one vocabulary, so use --recipe cpt."
        )
    if teacher is not None and teacher.fingerprint != cache.teacher.fingerprint:
        raise ShearlingError(
            f"{cache.path} holds what {cache.teacher.name} says, but --teacher {teacher.name} "
            "is another model; leave one of the two out."
        )
    for name, value, plain in (
        ("temperature", options.temperature, 1), ("hidden_share", options.hidden_share, 0)
    ):  # fmt: skip
        if value != plain:
            raise ShearlingError(
                f"{name}={value:g} was given, but {cache.path} does not hold what that takes; give "
                f"{name}={plain}, or --teacher in place of --teacher-cache."
            )


def check_output(output: Path, run: str = RUN) -> None:
    """Refuse an output that is taken by anything but a run that can be gone on with.

    Raises:
        ShearlingError: it is taken, or nothing can be written there.
    """
    check_writable(output)
    if not output.exists():
        return
    if not output.is_dir():
        raise ShearlingError(f"output {output} is a file; name a new directory.")
    if (output / "config.json").exists():
        raise ShearlingError(f"output {output} holds a finished model; name a new directory.")
    # Without a configuration, weights beside a run are those of an end that was cut short.
    if any(output.iterdir()) and not (output / run).is_dir():
        raise ShearlingError(
            f"output {output} is not empty, and what it holds is not of a {run} run; name a new "
            "directory."
        )


@contextmanager
def at_work(output: Path, run: str, world: World) -> Generator[None]:
    """Have an output to oneself, by its first rank.

    Raises:
        ShearlingError: another process works there, which is named; or it cannot be written.
    """
    with alone(output / run, output) if world.first else nullcontext():
        if world.first:
            check_output(output, run)  # which somebody may have finished in the meantime
        yield


def prepared(training: Training, before: Any) -> nn.Module:
    """The model of a phase, not sharded yet; the weights of the phase before are kept."""
    source, phase, world = training.source, training.options, training.world
    model = before
    if before is None and world.device.type == "cpu":
        check_host_memory(
            source, phase, ranks=world.local, teacher=training.present, least=world.least
        )
    if before is None:
        planned(training)
    if before is not None:
        read = adapters.reader(before)
        model = loaded(source, world, training.numbers.kept)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(read(name))
    if model is None:
        sharded = world.size > 1 and phase.recipe != "lora"
        model = empty(source) if sharded else loaded(source, world, training.numbers.kept)
    model.eval()  # no dropout: few tokens are seen twice
    if phase.recipe == "lora":
        torch.manual_seed(phase.seed)  # of the adapters' first values
        model = adapters.add(model, source, rank=phase.rank, alpha=phase.alpha)
    return model


def trainer(
    training: Training, model: nn.Module, folder: Path, *, learner: TrainedGates | None = None,
    shape: Mapping[str, int] | None = None,
) -> Trainer:  # fmt: skip
    """A trainer whose checkpoints and log go to ``folder``; all ranks have to ask for it.

    Args:
        training: what the run is given.
        model: of its phase.
        folder: a run's.
        learner: of gates that the model was attached to; ``shape``: what they lead to.
    """
    options, world = training.options, training.world
    made, fitting = objective(training, model, learner)
    told = identity(training) | ({} if shape is None else {"shape": dict(shape)})
    return Trainer(
        made, training.store, options, mixed(training.store, options, training.reference), folder,
        told, world, training.progress, training.notify, training.cache, fitting.micro,
    )  # fmt: skip


def objective(
    training: Training, model: nn.Module, learner: TrainedGates | None = None
) -> tuple[Objective, Fit]:
    """What is minimised, sharded, every weight in its place, and how a step fits in memory.

    Gates stay whole on every rank.
    """
    source, world, phase = training.source, training.world, training.options
    teacher, wise = training.present, None
    if teacher is not None:
        computed = training.numbers.computed if world.device.type == "cuda" else torch.float32
        wise = loaded(teacher, world, computed).eval().requires_grad_(False)
    inner = blocks(source, model)
    empty_still = any(parameter.is_meta for parameter in model.parameters())
    fitting = fitted(training, empty_still=empty_still, gated=learner is not None)
    prepare_blocks(inner, fitting, phase)
    distillation = Distillation(
        phase.temperature, phase.text_share, phase.hidden_share,
        None if teacher is None else blocks_in(source, teacher),
    )  # fmt: skip
    made = Objective(
        model, plain_head=source.plain_head, teacher=wise, distillation=distillation,
        learner=learner,
    )  # fmt: skip
    others = [] if teacher is None or wise is None else blocks(teacher, wise)
    apart = [] if learner is None else list(learner.parameters())
    shard(made, [*inner, *others], world, training.numbers.computed, apart=apart)
    if empty_still:
        fill(source, model, world)
    return made, fitting


def planned(training: Training) -> Fit | None:
    """How a step will fit on a GPU, before anything is loaded; None on a CPU.

    Raises:
        ShearlingError: it will not, with what it takes and what would do.
    """
    world, arithmetic, source = training.world, training.numbers, training.source
    free = free_on_gpu(world.device, world.allowed)
    if free is None:
        return None
    divided = 1 if training.options.recipe == "lora" else world.size
    weights = source.parameters * arithmetic.kept.itemsize // divided
    teacher = training.present
    if teacher is not None:
        weights += teacher.parameters * arithmetic.computed.itemsize // world.size
    left = int(world.least(free - weights))
    if left <= 0:
        whose = source.name if teacher is None else f"{source.name} and of {teacher.name}"
        raise ShearlingError(
            f"the weights of {whose} alone take {weights / 1e9:.1f} GB to train on {world.device}, "
            f"but {free / 1e9:.1f} GB of it are free; give optimizer=adamw8bit with "
            f"weight_dtype=bfloat16, {'--teacher-cache, ' if teacher else ''}or more GPUs."
        )
    rows = max(1, training.options.batch // world.size)
    budget = MemoryBudget(left, training.store.length, rows, world.size, arithmetic)
    return fit(source, training.options, budget)


def fitted(training: Training, *, empty_still: bool, gated: bool) -> Fit:
    """How a step fits in the memory of the rank that has least, told where that decides."""
    world, options = training.world, training.options
    free = free_on_gpu(world.device, world.allowed)
    if free is not None:
        waiting = training.source.parameters * 4 // world.size if empty_still else 0
        free = int(world.least(free - waiting))
    budget = MemoryBudget(
        free, training.store.length, max(1, options.batch // world.size), world.size,
        training.numbers, gated,
    )  # fmt: skip
    fitting = fit(training.source, options, budget)
    if free is not None:
        anew = ", activations computed anew in the backward pass" if fitting.checkpointing else ""
        training.notify(
            f"{fitting.micro} sequences at a time{anew}, for {free / 1e9:.0f} GB of free memory "
            "(micro=, checkpointing=)."
        )
    return fitting


def prepare_blocks(inner: list[nn.Module], fitting: Fit, phase: Options) -> None:
    """Compute activations anew, or compile, block by block, in place and before sharding."""
    for block in inner:
        if fitting.checkpointing:
            block.forward = _computed_anew(block.forward)
        if phase.compile:
            block.compile()


def _computed_anew(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function, its activations dropped and computed once more in the backward pass."""

    def products(*args: Any, **kwargs: Any) -> Tensor:
        with fast_products():  # the backward pass does not see what the loop has switched on
            return forward(*args, **kwargs)

    def again(*args: Any, **kwargs: Any) -> Tensor:
        return checkpointed(products, *args, use_reentrant=False, **kwargs)

    return again


def mixed(store: Store, phase: Options, reference: Mapping[str, float] | None) -> mixes.Weights:
    """The weights of a store's domains as a phase is to mix them."""
    sizes = {domain: len(store.sequences(domain)) for domain in store.domains}
    return mixes.build(
        phase.mix, sizes, weights=phase.weights, reference=reference, floors=phase.floor,
        caps=phase.cap,
    )  # fmt: skip


def identity(training: Training) -> dict[str, Any]:
    """What two runs must share for one to go on with the other's checkpoint."""
    teacher, cache = training.teacher, training.cache
    return {
        "model": training.source.fingerprint,
        "store": training.store.fingerprint,
        "teacher": None if teacher is None else teacher.fingerprint,
        "cache": None if cache is None else cache.fingerprint,
        "reference": None if training.reference is None else dict(training.reference),
        "options": training.options.model_dump(mode="json", exclude={*FREE}),
    }
