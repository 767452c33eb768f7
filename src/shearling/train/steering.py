"""What a run takes over from elsewhere: weights of domains, and reference losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shearling.data.store import Store
from shearling.engine.place import Place, Wish
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.model.lineage import final_weights
from shearling.train import saving
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
    world: World | None = None, *, run: Path | None = None, named: bool = True,
) -> dict[str, float] | None:  # fmt: skip
    """Reference losses for a dynamic mix: from a file, or measured on the teacher by all ranks.

    A run that goes on keeps the losses it began with: measured on another number of threads or
    ranks they would differ in their last digits. Without a world nothing is measured, as in a dry
    run; the losses are zeros then.

    Args:
        file: of losses, as `shearling reference` writes it.
        teacher: to measure, where there is no file; ``named`` where the user named it.
        store, options: of the run.
        world: ranks.
        run: the directory with the run's checkpoints, if any were written.

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
    kept = world.agreed(_kept(run, teacher.fingerprint if named else None))
    if kept is not None and set(kept) == set(store.domains):
        return kept
    place = Place.best(teacher, Wish(device=str(world.device), ranks=world))
    return measure(teacher, store, min(SEQUENCES, options.eval_sequences), place=place)


def _kept(run: Path | None, teacher: str | None) -> dict[str, float] | None:
    """The losses that a run of the same teacher follows; the newest readable checkpoint's."""
    phases = [] if run is None else sorted(path for path in run.glob("*") if path.is_dir())
    for checkpoint in (one for phase in phases for one in saving.newest_first(phase)):
        try:
            told = saving.read_state(checkpoint).identity
        except saving.DamagedCheckpoint:
            continue
        if told.get("teacher") == teacher and isinstance(told.get("reference"), dict):
            return told["reference"]
    return None


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
