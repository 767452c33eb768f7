"""Scoring a model by name: its blocks, or the units of a width.

Which function that is, and what it needs, is in :mod:`shearling.scoring.registry`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from shearling.data.calibration import Drawing, mixed_windows
from shearling.data.sources import TextSource, described_sources, settled_sources
from shearling.engine.place import Need, Place
from shearling.engine.stream import BlockStream
from shearling.errors import ShearlingError, count_of
from shearling.files.progress import Progress, silent
from shearling.model.checkpoint import Checkpoint
from shearling.model.loading import check_length
from shearling.model.manifest import stamp
from shearling.scoring.registry import Criterion, Kind, find, names
from shearling.scoring.score_experts import EXPERT_AXES, score_experts
from shearling.scoring.score_units import score_units
from shearling.scoring.scores import Scores
from shearling.scoring.units.places import check_axes
from shearling.table.kinds import described, most_removable

NO_TOKENS = torch.zeros(0, 0, dtype=torch.long)  # for criteria that read weights alone


def score(
    checkpoint: Checkpoint,
    by: str,
    *,
    axis: str = "layers",
    calibration: Path | Sequence[TextSource] | None = None,
    samples: int = 10,
    length: int = 128,
    seed: int = 0,
    bos: bool | None = None,
    place: Place | None = None,
    protect: tuple[int, int] | None = None,
    remove: int | None = None,
    progress: Progress = silent,
) -> Scores:
    """Score every block of a model, or every unit of a width.

    Args:
        checkpoint: the model.
        by: a criterion of blocks or of units; a trailing ``+`` protects the first 4 blocks and
            the last 2.
        axis: ``layers`` for the blocks, or ``mlp``, ``heads``, ``kv_heads``, ``linear_heads``,
            ``hidden``, ``experts`` or ``expert_mlp``.
        calibration: text (.jsonl, .txt or a directory of such), or several sources; criteria that
            read weights alone need none.
        samples: number of calibration sequences.
        length: tokens in each.
        seed: of every random choice.
        bos: whether each begins with BOS; None follows the tokenizer.
        place: where it runs; chosen by the memory that is free, if not given.
        protect: how many of the first and of the last blocks are never removed; default by
            criterion. Not looked at for units.
        remove: how many blocks are to go: refused beforehand if too many are protected, and for
            ``greedy`` where it stops (default half of those unprotected), for ``repair`` the
            length of a run (default a fifth of the blocks). Not looked at for units.
        progress: told how far the work is.

    Raises:
        ShearlingError: unknown criterion or axis, no calibration text where one is needed, a text
            too short for the samples asked for, too many blocks protected, or weights that give
            no finite score.
    """
    started = time.perf_counter()
    criterion, protected = checked(checkpoint, by, axis, protect, remove)
    ids_NS, used = NO_TOKENS, None
    if not criterion.textless:
        if calibration is None:
            raise no_text(by)
        sources = settled_sources(calibration)
        drawing = Drawing(samples=samples, length=length, seed=seed, bos=bos)
        windows = mixed_windows(sources, checkpoint.tokenizer(), drawing)
        ids_NS = windows.ids_NS
        check_length(ids_NS.shape[1], checkpoint.config, checkpoint.name)
        used = described_sources(sources, samples)
        used |= {"samples": samples, "length": length, "seed": seed, "bos": windows.bos is not None}
    if axis == "layers" and criterion.textless:  # reads tensors alone, and no model is built
        scores = score_weights(checkpoint, by, protected=protected, progress=progress)
    else:
        place = place or Place.best(
            checkpoint, need=states_kept(checkpoint, by, axis, ids_NS.numel())
        )
        blocks = BlockStream(checkpoint, place)
        if axis == "layers":
            scores = score_tokens(
                blocks, by, ids_NS, protected=protected, remove=remove, progress=progress
            )
        elif axis in EXPERT_AXES:
            scores = score_experts(blocks, by, ids_NS, [axis], progress=progress)[axis]
        else:
            scores = score_units(blocks, by, ids_NS, [axis], seed=seed, progress=progress)[axis]
    return scores.with_details(
        **stamp(checkpoint), calibration=used, seconds=round(time.perf_counter() - started, 2)
    )


def no_text(by: str) -> ShearlingError:
    """What to say where a criterion needs text and has none."""
    return ShearlingError(f"criterion {by} runs the model on text; give --calibration FILE.")


def checked(
    checkpoint: Checkpoint, by: str, axis: str, protect: tuple[int, int] | None, remove: int | None
) -> tuple[Criterion, tuple[int, ...]]:
    """What the criterion declares, and the protected blocks, if it and the axis go together.

    Arguments and errors as :func:`score`.
    """
    if axis == "layers":
        return find(by, "blocks"), protected_blocks(checkpoint, by, protect, remove)
    of = kind_of(axis)
    if by not in names(of):
        raise ShearlingError(
            f"criterion {by!r} does not score units of {axis}; choose one of "
            f"{', '.join(names(of))}."
        )
    if of == "units":
        check_axes(checkpoint.layout, (axis,))
    return find(by, of), ()


def kind_of(axis: str) -> Kind:
    """What the units of an axis are to a criterion."""
    if axis == "layers":
        return "blocks"
    return "experts" if axis in EXPERT_AXES else "units"


def states_kept(checkpoint: Checkpoint, by: str, axis: str, tokens: int) -> Need:
    """What a criterion keeps between two blocks, of so many tokens; of an unknown one, nothing."""
    of = kind_of(axis)
    if by not in names(of) or find(by, of).textless:
        return Need()
    known, depth = find(by, of), checkpoint.shape["layers"]
    each = known.gradients or (of == "blocks" and not known.one_pass)
    return Need(tokens, (depth + 1 if each else 2) * checkpoint.shape["hidden"])


def score_tokens(
    stream: BlockStream,
    by: str,
    ids_NS: torch.Tensor,
    *,
    protected: tuple[int, ...] = (),
    remove: int | None = None,
    progress: Progress = silent,
) -> Scores:
    """Score every block on given tokens (N, S), which criteria of weights do not look at.

    Raises:
        ShearlingError: an unknown criterion, more blocks to remove than may go, or weights that
            give no finite score.
    """
    criterion = find(by, "blocks")
    if criterion.textless:
        return score_weights(stream.checkpoint, by, protected=protected, progress=progress)
    more = {"remove": remove} if criterion.removes else {}
    scores = criterion.function(stream, ids_NS, protected=protected, progress=progress, **more)
    return _named(scores, by, stream.checkpoint)


def score_removals(
    stream: BlockStream,
    by: str,
    ids_NS: torch.Tensor,
    removes: Sequence[int],
    *,
    protected: tuple[int, ...] = (),
    progress: Progress = silent,
) -> list[Scores]:
    """As :func:`score_tokens`, for several numbers of blocks that are to go.

    What does not depend on the number is computed once.

    Returns:
        Scores for each of ``removes``; each is what it would be alone.
    """
    criterion, several = find(by, "blocks"), find(by, "blocks").several
    numbers = list(dict.fromkeys(removes))
    if several is not None and len(numbers) > 1:
        scored = several(stream, ids_NS, numbers, protected=protected, progress=progress)
        by_number = {
            number: _named(scores, by, stream.checkpoint)
            for number, scores in zip(numbers, scored, strict=True)
        }
    else:
        runs = numbers if criterion.removes else numbers[:1]
        by_number = {
            number: score_tokens(
                stream, by, ids_NS, protected=protected, remove=number, progress=progress
            )
            for number in runs
        }
    return [by_number.get(number, by_number[numbers[0]]) for number in removes]


def score_weights(
    checkpoint: Checkpoint, by: str, *, protected: tuple[int, ...] = (), progress: Progress = silent
) -> Scores:
    """Score every block by a criterion that reads weights alone (ShearlingError as above)."""
    function = find(by, "blocks").function
    return _named(function(checkpoint, protected=protected, progress=progress), by, checkpoint)


def protected_blocks(
    checkpoint: Checkpoint, by: str, protect: tuple[int, int] | None, remove: int | None = None
) -> tuple[int, ...]:
    """The blocks that are never removed: as asked for, or else as the criterion declares.

    Raises:
        ShearlingError: an unknown criterion, more protected than can be, or more to be removed
            than may go, of which one of each kind may not.
    """
    depth, kinds = checkpoint.shape["layers"], checkpoint.layout.kinds
    first, last = find(by, "blocks").protects if protect is None else protect
    if first < 0 or last < 0 or first + last >= depth:
        raise ShearlingError(
            f"protecting the first {first} and the last {last} of "
            f"{count_of(depth, 'block')} leaves none to remove; "
            "protect fewer (--protect-first, --protect-last)."
        )
    protected = (*range(first), *range(depth - last, depth))
    most = most_removable(kinds, depth, protected)
    if remove is not None and remove > most:
        stays = f", as one of each kind stays ({described(kinds)})" if kinds else ""
        raise ShearlingError(
            f"{remove} of {count_of(depth, 'block')} were to be removed, but only "
            f"{most} {'is' if most == 1 else 'are'} not protected{stays}; "
            "remove fewer, or protect fewer (--protect-first, --protect-last)."
        )
    return protected


def _named(scores: Scores, by: str, checkpoint: Checkpoint) -> Scores:
    """Under the name that was asked for, which may end in ``+``, and with finite numbers."""
    return replace(scores.require_finite(checkpoint.name, by), criterion=by)
