"""Criteria: each one typed function, with its paper's link, listed in one table."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch

from shearling.data.text import calibration_windows, documents
from shearling.engine.place import Place
from shearling.engine.stream import BlockStream
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.model.checkpoint import Checkpoint
from shearling.scoring.blocks.influence import influence
from shearling.scoring.blocks.magnitude import magnitude
from shearling.scoring.blocks.perplexity import greedy, perplexity
from shearling.scoring.blocks.repair import repair
from shearling.scoring.blocks.taylor import taylor
from shearling.scoring.scores import Scores

CRITERIA = ("perplexity", "taylor+", "magnitude+", "taylor", "magnitude", "influence", "greedy")
# Blocks that the "+" forms never remove (Shortened LLaMA, section 3.1).
PROTECT_FIRST, PROTECT_LAST = 4, 2


def score(
    checkpoint: Checkpoint,
    by: str,
    *,
    calibration: Path | None = None,
    samples: int = 10,
    length: int = 128,
    seed: int = 0,
    place: Place | None = None,
    protect: tuple[int, int] | None = None,
    remove: int | None = None,
    progress: Progress = silent,
) -> Scores:
    """Score every block of a model.

    Args:
        checkpoint: the model.
        by: one of ``CRITERIA`` or ``repair``; a trailing ``+`` protects the first 4 blocks and
            the last 2.
        calibration: text (.jsonl, .txt or a directory of such); magnitude needs none.
        samples: number of calibration sequences.
        length: tokens in each.
        seed: of the choice of sequences.
        place: where it runs; chosen by the memory that is free, if not given.
        protect: how many of the first and of the last blocks are never removed; default by
            criterion.
        remove: how many blocks are to go: refused beforehand if too many are protected, and for
            ``greedy`` where it stops (default half of those unprotected), for ``repair`` the
            length of a run (default a fifth of the blocks).
        progress: told how far the work is.

    Raises:
        ShearlingError: unknown criterion, no calibration text where one is needed, a text too
            short for the samples asked for, too many blocks protected, or weights that give
            no finite score.
    """
    started = time.perf_counter()
    depth = checkpoint.shape["layers"]
    name, protected = protected_blocks(by, protect, depth, remove)
    if name == "magnitude":
        scores = magnitude(checkpoint, protected=protected, progress=progress)
        return _finish(scores, checkpoint, by, started, None)
    if calibration is None:
        raise ShearlingError(f"criterion {by} runs the model on text; give --calibration FILE.")
    ids_NS = calibration_windows(
        documents(calibration), checkpoint.tokenizer(), samples=samples, length=length, seed=seed
    )
    blocks = BlockStream(checkpoint, place or Place.best(checkpoint))
    scores = score_tokens(
        blocks, name, ids_NS, protected=protected, remove=remove, progress=progress
    )
    used = {"file": calibration.name, "samples": samples, "length": length, "seed": seed}
    return _finish(scores, checkpoint, by, started, used)


def score_tokens(
    stream: BlockStream,
    by: str,
    ids_NS: torch.Tensor,
    *,
    protected: tuple[int, ...] = (),
    remove: int | None = None,
    progress: Progress = silent,
) -> Scores:
    """Score every block on given tokens (N, S); ``by`` without a ``+``."""
    if by == "greedy":
        free = stream.depth - len(protected)
        remove = max(1, free // 2) if remove is None else remove
        if not 1 <= remove < stream.depth or remove > free:
            raise ShearlingError(
                f"greedy removal was asked to remove {remove} blocks, but at most "
                f"{min(free, stream.depth - 1)} of {stream.depth} may go."
            )
        return greedy(stream, ids_NS, protected=protected, remove=remove, progress=progress)
    if by == "repair":
        remove = max(1, stream.depth // 5) if remove is None else remove
        return repair(stream, ids_NS, protected=protected, remove=remove, progress=progress)
    criterion = {"perplexity": perplexity, "taylor": taylor, "influence": influence}[by]
    return criterion(stream, ids_NS, protected=protected, progress=progress)


def protected_blocks(
    by: str, protect: tuple[int, int] | None, depth: int, remove: int | None = None
) -> tuple[str, tuple[int, ...]]:
    """The criterion's name without its ``+``, and the blocks that are never removed.

    Raises:
        ShearlingError: an unknown criterion, or more protected than can be.
    """
    if by not in (*CRITERIA, "repair"):
        raise ShearlingError(f"criterion {by!r} is not known; choose one of {', '.join(CRITERIA)}.")
    default = (PROTECT_FIRST, PROTECT_LAST) if by.endswith("+") else (0, 0)
    first, last = default if protect is None else protect
    if first < 0 or last < 0 or first + last >= depth:
        raise ShearlingError(
            f"protecting the first {first} and the last {last} of {depth} blocks leaves none to "
            "remove; protect fewer (--protect-first, --protect-last)."
        )
    protected = (*range(first), *range(depth - last, depth))
    if remove is not None and remove > depth - len(protected):
        raise ShearlingError(
            f"{remove} of {depth} blocks were to be removed, but only {depth - len(protected)} are "
            "not protected; remove fewer, or protect fewer (--protect-first, --protect-last)."
        )
    return by.removesuffix("+"), protected


def require_finite(scores: Scores, checkpoint: Checkpoint, by: str) -> Scores:
    """These scores, if all of them are numbers to compare by (ShearlingError)."""
    broken = [block for block, value in enumerate(scores.values) if not math.isfinite(value)]
    if broken:
        raise ShearlingError(
            f"{by} gives no finite score for {len(broken)} of {len(scores.values)} blocks of "
            f"{checkpoint.name}, the first being {broken[0]}; its weights hold NaN or infinity, "
            "or overflow: fetch the checkpoint again."
        )
    return scores


def _finish(
    scores: Scores, checkpoint: Checkpoint, by: str, started: float, calibration: dict | None
) -> Scores:
    from dataclasses import replace

    from shearling.model.manifest import stamp

    return replace(require_finite(scores, checkpoint, by), criterion=by).with_details(
        **stamp(checkpoint),
        calibration=calibration,
        seconds=round(time.perf_counter() - started, 2),
    )


__all__ = ["CRITERIA", "Scores", "protected_blocks", "require_finite", "score", "score_tokens"]
