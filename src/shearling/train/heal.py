"""Healing: a cut model retrained by a recipe, and handed back as a stock checkpoint.

The output directory is a model like any other once it is done; until then it holds ``healing/``
alone, with the checkpoints and the log, from which a run that was stopped goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from shearling.files.progress import Progress, silent
from shearling.model.checkpoint import Checkpoint
from shearling.model.lineage import blocks_in
from shearling.model.manifest import describe
from shearling.train import adapters
from shearling.train import weights as mixes
from shearling.train.build import blocks, empty, fill, loaded
from shearling.train.finish import RUN, write
from shearling.train.loop import Trainer
from shearling.train.objective import Objective, TrainedGates
from shearling.train.options import Options
from shearling.train.parallel import World, shard


@dataclass(frozen=True)
class Healed:
    """What became of a run: ``model`` is None where it was stopped before its end."""

    model: Checkpoint | None
    step: int
    steps: int


def heal(
    source: Checkpoint,
    store: Store,
    options: Options,
    output: Path,
    *,
    teacher: Checkpoint | None = None,
    cache: Cache | None = None,
    reference: Mapping[str, float] | None = None,
    world: World | None = None,
    progress: Progress = silent,
    notify: Callable[[str], None] = lambda message: None,
) -> Healed:
    """Retrain a model; goes on by itself from what ``output`` holds of the same run.

    Args:
        source: the model to heal; never written to.
        store: packed text of the same tokenizer.
        options: the recipe and its numbers.
        output: a new directory, or one that a stopped run left.
        teacher: for ``distill``: the model whose distribution is learned, such as the source
            that was cut.
        cache: for ``distill``: what a teacher said of the store, instead of the teacher itself.
        reference: domain -> reference loss (nats), for a dynamic mix.
        world: ranks; one process alone if not given.
        progress, notify: told how far the run is; told what a user should know.

    Raises:
        ShearlingError: options that do not go together, data of another tokenizer, a teacher of
            another vocabulary, an output that is taken, a loss that is not finite, a full disk.
    """
    world = world or World()
    check(source, store, options, output, teacher=teacher, cache=cache, reference=reference)
    model, step, steps = None, 0, 0
    for number, phase in enumerate(phases(options), 1):
        name = phase.recipe if phase is options else f"{number}-{phase.recipe}"
        model = prepared(source, phase, world, model)
        trainer = Trainer(
            objective(source, model, None if cache else teacher, phase, world), store, phase,
            mixed(store, phase, reference), output / RUN / name,
            identity(source, store, phase, teacher, cache), world, progress, notify, cache,
        )  # fmt: skip
        trainer.run()
        step, steps = trainer.step, trainer.steps
        if trainer.stopped and step < steps:
            return Healed(None, step, steps)
    assert model is not None
    write(source, model, output, options, store, _taught_by(teacher, cache), world, reference)
    return Healed(Checkpoint.open(output) if world.first else None, step, steps)


def phases(options: Options) -> list[Options]:
    """The runs that a recipe consists of, each with its share of the tokens."""
    if options.recipe != "cpt-then-lora":
        return [options]
    half = max(1, options.tokens // 2)
    rest = {"tokens": max(1, options.tokens - half), "lr": options.lora_lr or options.lr}
    return [
        options.model_copy(update={"recipe": "cpt", "tokens": half}),
        options.model_copy(update={"recipe": "lora"} | rest),
    ]


def check(
    source: Checkpoint, store: Store, options: Options, output: Path, *,
    teacher: Checkpoint | None, reference: Mapping[str, float] | None, cache: Cache | None = None,
    run: str = RUN,
) -> None:  # fmt: skip
    """Refuse what cannot work before anything is loaded (ShearlingError)."""
    store.check_tokenizer(source.path)
    check_output(output, run)
    if cache is not None:
        _check_cache(cache, source, store, options, teacher)
    elif options.recipe == "distill":
        if teacher is None:
            raise ShearlingError(
                "--recipe distill learns from a model; give --teacher SOURCE, or --teacher-cache."
            )
        if teacher.shape["vocab"] != source.shape["vocab"]:
            raise ShearlingError(
                f"the teacher knows {teacher.shape['vocab']} tokens and the model "
                f"{source.shape['vocab']}; distillation needs one vocabulary, so use --recipe cpt."
            )
        if options.hidden_share and teacher.shape["hidden"] != source.shape["hidden"]:
            raise ShearlingError(
                f"hidden_share was given, but the teacher is {teacher.shape['hidden']} wide and "
                f"the model {source.shape['hidden']}; leave it out."
            )
    if options.mix == "dynamic" and reference is None:
        raise ShearlingError(
            "mix=dynamic follows losses over a reference; give --reference FILE (`shearling "
            "reference` makes one), or a --teacher to measure it on."
        )
    mixed(store, options, reference)
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
    if teacher is not None and teacher.fingerprint != cache.teacher["fingerprint"]:
        raise ShearlingError(
            f"{cache.path} holds what {cache.teacher['name']} says, but --teacher {teacher.name} "
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
    """Refuse an output that is taken by anything but a run that can be gone on with."""
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


def prepared(source: Checkpoint, phase: Options, world: World, before: Any) -> nn.Module:
    """The model of a phase, not sharded yet; the weights of the phase before are kept."""
    if before is not None:
        read = adapters.reader(before)
        found = loaded(source, world)
        with torch.no_grad():
            for name, parameter in found.named_parameters():
                parameter.copy_(read(name))
        before = found
    model = before
    if model is None:
        sharded = world.size > 1 and phase.recipe != "lora"
        model = empty(source) if sharded else loaded(source, world)
    model.eval()  # no dropout: few tokens are seen twice
    if phase.recipe == "lora":
        torch.manual_seed(phase.seed)  # of the adapters' first values
        model = adapters.add(model, source, rank=phase.rank, alpha=phase.alpha)
    return model


def objective(
    source: Checkpoint, model: nn.Module, teacher: Checkpoint | None, phase: Options,
    world: World, learner: TrainedGates | None = None,
) -> Objective:  # fmt: skip
    """What is minimised, sharded, every weight in its place; gates stay whole on every rank."""
    inner, wise = blocks(source, model), None
    _prepare_blocks(inner, phase)
    if phase.recipe == "distill" and teacher is not None:  # else there is a cache
        wise = loaded(teacher, world).eval().requires_grad_(False)
    found = Objective(
        model, plain_head=source.plain_head, teacher=wise, temperature=phase.temperature,
        text_share=phase.text_share, hidden_share=phase.hidden_share, learner=learner,
        stands_for=None if teacher is None else blocks_in(source, teacher),
    )  # fmt: skip
    dtype = torch.bfloat16 if phase.dtype == "bfloat16" else torch.float32
    if phase.dtype == "auto" and world.device.type == "cuda":
        dtype = torch.bfloat16
    others = [] if teacher is None or wise is None else blocks(teacher, wise)
    apart = [] if learner is None else list(learner.parameters())
    shard(found, [*inner, *others], world, dtype, apart=apart)
    if any(parameter.is_meta for parameter in model.parameters()):
        fill(source, model, world)
    return found


def _prepare_blocks(inner: list[nn.Module], phase: Options) -> None:
    """Compute activations anew, or compile, block by block, in place and before sharding."""
    for block in inner:
        if phase.checkpointing:
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


def _taught_by(teacher: Checkpoint | None, cache: Cache | None) -> dict[str, Any] | None:
    """The teacher, for the manifest."""
    if cache is not None:
        return dict(cache.teacher) | {"cache": cache.fingerprint, "top": cache.top}
    return None if teacher is None else describe(teacher)


def identity(
    source: Checkpoint, store: Store, phase: Options, teacher: Checkpoint | None,
    cache: Cache | None,
) -> dict[str, Any]:  # fmt: skip
    """What two runs must share for one to go on with the other's checkpoint."""
    free = ("save_every", "keep", "eval_every", "eval_sequences", "micro", "trackers")
    return {
        "model": source.fingerprint,
        "store": store.fingerprint,
        "teacher": None if teacher is None else teacher.fingerprint,
        "cache": None if cache is None else cache.fingerprint,
        "options": phase.model_dump(mode="json", exclude=set(free)),
    }
