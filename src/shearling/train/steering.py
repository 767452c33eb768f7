"""What a run takes over from elsewhere: weights of domains, and reference losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shearling.data.store import Store
from shearling.engine.place import Place, Wish
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.model.lineage import final_weights
from shearling.train.options import Options
from shearling.train.parallel import World
from shearling.train.reference import SEQUENCES, Reference, measure


def inherited(
    options: Options, source: Checkpoint, store: Store, notify: Callable[[str], None]
) -> Options:
    """Weights that were not given go on from where the model's last training left them."""
    if options.mix == "proportional" or options.weights is not None:
        return options
    weights = final_weights(source)
    if weights is None or set(weights) != set(store.domains):
        return options
    notify(f"the domains start with the weights that the training of {source.name} ended with.")
    return options.model_copy(update={"weights": weights})


def references(
    file: Path | None, teacher: Checkpoint | None, store: Store, options: Options,
    world: World | None = None,
) -> dict[str, float] | None:  # fmt: skip
    """Reference losses for a dynamic mix: from a file, or measured on the teacher by all ranks.

    Without a world nothing is measured, as in a dry run; the losses are zeros then.

    Raises:
        ShearlingError: losses of another tokenizer, or of sequences that begin otherwise.
    """
    if options.mix != "dynamic":
        return None
    if file is not None:
        reference = Reference.load(file)
        _check_store(reference, file, store)
        return reference.losses
    if teacher is None:
        return None
    if world is None:
        return dict.fromkeys(store.domains, 0.0)
    place = Place.best(teacher, Wish(device=str(world.device), ranks=world))
    return measure(teacher, store, min(SEQUENCES, options.eval_sequences), place=place)


def _check_store(reference: Reference, file: Path, store: Store) -> None:
    """Raise ShearlingError unless the losses of ``file`` are of such tokens as the store holds."""
    if reference.tokenizer not in (None, store.tokenizer):
        raise ShearlingError(
            f"the losses of {file} were measured with another tokenizer than {store.path} was "
            "packed with; measure them on that store."
        )
    if reference.tokenizer is not None and reference.bos != store.bos:
        raise ShearlingError(
            f"the losses of {file} were measured on sequences that "
            f"{_begin(reference.bos)}, but those of {store.path} {_begin(store.bos)}; measure "
            "them on that store."
        )


def _begin(bos: int | None) -> str:
    return "do not begin with BOS" if bos is None else f"begin with BOS (token {bos})"
