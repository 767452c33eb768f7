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

from shearling.checkpoint import Checkpoint
from shearling.data import weights as mixes
from shearling.data.store import Store
from shearling.errors import ShearlingError
from shearling.products import fast_products
from shearling.progress import Progress, silent
from shearling.train import adapters
from shearling.train.build import blocks, empty, fill, loaded
from shearling.train.finish import RUN, write
from shearling.train.loop import Trainer
from shearling.train.objective import Objective
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
        reference: domain -> reference loss (nats), for a dynamic mix.
        world: ranks; one process alone if not given.
        progress, notify: told how far the run is; told what a user should know.

    Raises:
        ShearlingError: options that do not go together, data of another tokenizer, a teacher of
            another vocabulary, an output that is taken, a loss that is not finite, a full disk.
    """
    world = world or World()
    check(source, store, options, output, teacher=teacher, reference=reference)
    model, step, steps = None, 0, 0
    for number, phase in enumerate(phases(options), 1):
        name = phase.recipe if phase is options else f"{number}-{phase.recipe}"
        model = _prepared(source, phase, world, model)
        trainer = Trainer(
            _objective(source, model, teacher, phase, world), store, phase,
            _weights(store, phase, reference), output / RUN / name,
            _identity(source, store, phase, teacher), world, progress, notify,
        )  # fmt: skip
        trainer.run()
        step, steps = trainer.step, trainer.steps
        if trainer.stopped and step < steps:
            return Healed(None, step, steps)
    assert model is not None
    write(source, model, output, options, store, teacher, world)
    return Healed(Checkpoint.open(output) if world.first else None, step, steps)


def phases(options: Options) -> list[Options]:
    """The runs that a recipe consists of, each with its share of the tokens."""
    if options.recipe != "cpt-then-lora":
        return [options]
    half = max(1, options.tokens // 2)
    return [
        options.model_copy(update={"recipe": "cpt", "tokens": half}),
        options.model_copy(update={"recipe": "lora", "tokens": max(1, options.tokens - half)}),
    ]


def check(
    source: Checkpoint, store: Store, options: Options, output: Path, *,
    teacher: Checkpoint | None, reference: Mapping[str, float] | None,
) -> None:  # fmt: skip
    """Refuse what cannot work before anything is loaded (ShearlingError)."""
    store.check_tokenizer(source.path)
    _check_output(output)
    if options.recipe == "distill":
        if teacher is None:
            raise ShearlingError("--recipe distill learns from a model; give --teacher SOURCE.")
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
    _weights(store, options, reference)
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


def _check_output(output: Path) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise ShearlingError(f"output {output} is a file; name a new directory.")
    if (output / "config.json").exists():
        raise ShearlingError(f"output {output} holds a finished model; name a new directory.")
    # Without a configuration, weights beside a run are those of an end that was cut short.
    if any(output.iterdir()) and not (output / RUN).is_dir():
        raise ShearlingError(
            f"output {output} is not empty, and what it holds is not of a healing run; name a new "
            "directory."
        )


def _prepared(source: Checkpoint, phase: Options, world: World, before: Any) -> nn.Module:
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


def _objective(
    source: Checkpoint, model: nn.Module, teacher: Checkpoint | None, phase: Options, world: World
) -> Objective:
    """What is minimised, sharded, every weight in its place."""
    inner, wise = blocks(source, model), None
    _prepare_blocks(inner, phase)
    if phase.recipe == "distill":
        assert teacher is not None
        wise = loaded(teacher, world).eval().requires_grad_(False)
    objective = Objective(
        model, plain_head=plain_head(source), teacher=wise, temperature=phase.temperature,
        text_share=phase.text_share, hidden_share=phase.hidden_share,
    )  # fmt: skip
    dtype = torch.bfloat16 if phase.dtype == "bfloat16" else torch.float32
    if phase.dtype == "auto" and world.device.type == "cuda":
        dtype = torch.bfloat16
    others = [] if teacher is None or wise is None else blocks(teacher, wise)
    shard(objective, [*inner, *others], world, dtype)
    if any(parameter.is_meta for parameter in model.parameters()):
        fill(source, model, world)
    return objective


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


def plain_head(checkpoint: Checkpoint) -> bool:
    """Whether logits are the head's product and no more: not where they are soft-capped."""
    return getattr(checkpoint.config, "final_logit_softcapping", None) is None


def _weights(store: Store, phase: Options, reference: Mapping[str, float] | None) -> mixes.Weights:
    sizes = {domain: len(store.sequences(domain)) for domain in store.domains}
    return mixes.build(
        phase.mix, sizes, weights=phase.weights, reference=reference, floors=phase.floor,
        caps=phase.cap,
    )  # fmt: skip


def _identity(
    source: Checkpoint, store: Store, phase: Options, teacher: Checkpoint | None
) -> dict[str, Any]:
    """What two runs must share for one to go on with the other's checkpoint."""
    free = ("save_every", "keep", "eval_every", "eval_sequences", "micro", "trackers")
    return {
        "model": source.fingerprint,
        "store": store.fingerprint,
        "teacher": None if teacher is None else teacher.fingerprint,
        "options": phase.model_dump(mode="json", exclude=set(free)),
    }
