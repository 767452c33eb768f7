"""From a target shape to a repaired checkpoint: score, choose, refit and cut, joined.

What is removed follows from a criterion for blocks and one for units; each has a default that is
the best we measured (docs/one_shot.md). The calibration windows serve the criteria as they are,
and the repair together with copies that the source model rewrote in part, and more that it wrote.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shearling.data.text import documents
from shearling.engine.stream import BlockStream
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.files.writer import check_output, check_space
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.choose import account, keep_layers
from shearling.pruning.cut import SHARD_BYTES, cut, written_bytes
from shearling.repair.calibration import Calibration, repair_text
from shearling.repair.refit import Repair, refit
from shearling.repair.rotate import require_rotatable, rotate
from shearling.scoring.blocks.magnitude import magnitude
from shearling.scoring.blocks.repair import repairable, run_starts
from shearling.scoring.registry import CRITERIA, protected_blocks, require_finite, score_tokens
from shearling.scoring.scores import Scores
from shearling.scoring.unit_scores import UnitScores, keep_units
from shearling.scoring.units import TEXTLESS, UNIT_CRITERIA, score_units
from shearling.scoring.units.places import check_axes
from shearling.table.axes import Indices, Keep, Shape

BY_UNITS = "fisher-energy"
# What criteria that run each removal use of the windows: the paper's ten sequences of 128 tokens.
BLOCK_SAMPLES, BLOCK_LENGTH = 10, 128
_WIDTHS = ("hidden", "heads", "kv_heads", "mlp")


@dataclass(frozen=True, slots=True)
class Choice:
    """What is to survive, and how that came about.

    Attributes:
        keep: the choice.
        options: for the manifest.
        rotated: whether ``keep`` has the first channels of a rotated stream, not the source's own.
    """

    keep: Keep
    options: Mapping[str, Any]
    rotated: bool = False


def criteria_for(by: str | None, checkpoint: Checkpoint, *, repaired: bool) -> tuple[str, str]:
    """The criterion for blocks and the one for units that ``--by`` names, defaults filled in.

    Raises:
        ShearlingError: an unknown name, or two for the same kind of unit.
    """
    blocks = "repair" if repaired and repairable(checkpoint) else "perplexity"
    found: dict[str, str] = {}
    names = [] if by is None else [part.strip() for part in by.split(",")]
    # taylor is a name of both kinds, and stands for what the other name does not.
    for name in sorted(names, key=lambda name: len(kinds(name))):
        free = [kind for kind in kinds(name) if kind not in found]
        if not free:
            raise ShearlingError(f"--by {by} names two criteria for {kinds(name)[-1]}; give one.")
        found |= dict.fromkeys(free, name)
    return found.get("blocks", blocks), found.get("units", BY_UNITS)


def kinds(name: str) -> tuple[str, ...]:
    """What a criterion scores: ``blocks``, ``units`` or both (ShearlingError if unknown)."""
    of_blocks, of_units = name in (*CRITERIA, "repair"), name in UNIT_CRITERIA
    if not of_blocks and not of_units:
        raise ShearlingError(
            f"criterion {name!r} is not known; choose for blocks one of repair, "
            f"{', '.join(CRITERIA)}, for units one of {', '.join(UNIT_CRITERIA)}, "
            "or one of each, separated by a comma."
        )
    return ("blocks",) * of_blocks + ("units",) * of_units


def score_axis(
    checkpoint: Checkpoint,
    by: str,
    axis: str,
    calibration: Calibration | None,
    *,
    seed: int = 0,
    stream: bool | None = None,
    progress: Progress = silent,
) -> UnitScores:
    """Score the units of one width axis.

    Raises:
        ShearlingError: an unknown criterion or axis, or no text where one is needed.
    """
    from shearling.model.manifest import stamp

    started = time.perf_counter()
    if by not in UNIT_CRITERIA:
        raise ShearlingError(
            f"criterion {by!r} does not score units of {axis}; choose one of "
            f"{', '.join(UNIT_CRITERIA)}."
        )
    check_axes(checkpoint.layout, (axis,))
    ids_NS = _Windows(checkpoint, calibration).of_units(by)
    blocks = BlockStream(checkpoint, resident=None if stream is None else not stream)
    found = score_units(blocks, by, ids_NS, [axis], seed=seed, progress=progress)[axis]
    return found.with_details(
        **stamp(checkpoint),
        calibration=calibration.as_json() if calibration else None,
        seconds=round(time.perf_counter() - started, 2),
    )


def choose(
    checkpoint: Checkpoint,
    after: Shape,
    *,
    by: str | None = None,
    calibration: Calibration | None = None,
    scores: Scores | None = None,
    keep_blocks: Keep | None = None,
    repaired: bool = True,
    rotated: bool = False,
    protect: tuple[int, int] | None = None,
    stream: bool | None = None,
    progress: Progress = silent,
) -> Choice:
    """Choose what survives a cut to ``after``.

    Args:
        checkpoint: the source.
        after: every axis with its size after the cut.
        by: criteria, as in :func:`criteria_for`.
        calibration: text; criteria by magnitude and at random need none.
        scores: of blocks, if they are known already.
        keep_blocks: the surviving blocks, if they are chosen already.
        repaired: whether a repair will follow.
        rotated: cut ``hidden``, if it shrinks, in the stream's principal basis
            (:mod:`shearling.repair.rotate`); no criterion then chooses channels.
        protect: how many of the first and of the last blocks are never removed.
        stream: read blocks from disk (True), hold the model in memory (False), or as memory allows.
        progress: told how far the work is.

    Raises:
        ShearlingError: an impossible shape, an unknown criterion, no text where one is needed.
    """
    started = time.perf_counter()
    before = checkpoint.shape
    checkpoint.family.check(checkpoint.config, after)
    by_blocks, by_units = criteria_for(by, checkpoint, repaired=repaired)
    windows = _Windows(checkpoint, calibration)
    rotated = rotated and after["hidden"] < before["hidden"]
    widths = _widths(checkpoint, after, windows, rotated=rotated)
    keep = keep_blocks or Keep()
    remove = before["layers"] - after["layers"] if keep_blocks is None else 0
    # What can be refused is refused here, before the model is read.
    if remove and scores is not None:
        keep = keep_layers(scores, after["layers"])
    scoring = remove > 0 and scores is None
    if scoring:
        _check_blocks(checkpoint, by_blocks, windows, protect, remove)
    ids_NS = windows.of_units(by_units) if widths else None
    if repaired and calibration is not None:
        windows.of("repair")
    vocab = _vocabulary(checkpoint, after, windows)
    blocks = None
    if scoring or widths:
        blocks = BlockStream(checkpoint, resident=None if stream is None else not stream)
    if scoring and blocks is not None:
        scores = _score_blocks(blocks, by_blocks, windows, protect, remove, progress)
        keep = keep_layers(scores, after["layers"])
    options = account(keep, before["layers"], scores) if "layers" in keep.model else {}
    if blocks is not None and ids_NS is not None:
        seed = calibration.seed if calibration else 0
        found = score_units(blocks, by_units, ids_NS, widths, seed=seed, progress=progress)
        layers = keep.model.get("layers", tuple(range(before["layers"])))
        scored = after.with_(hidden=before["hidden"]) if rotated else after
        units = keep_units(found, checkpoint.layout, before, scored, layers)
        keep = Keep({**keep.model, **units.model}, units.blocks)
        options |= {"unit_criterion": by_units}
    hidden = {"hidden": tuple(range(after["hidden"]))} if rotated else {}
    keep = replace(keep, model={**keep.model, **hidden, **vocab})
    if calibration is not None:
        options["calibration"] = calibration.as_json()
    options["seconds_choosing"] = round(time.perf_counter() - started, 2)
    return Choice(keep, options, rotated)


def _widths(checkpoint: Checkpoint, after: Shape, windows: _Windows, *, rotated: bool) -> list[str]:
    """The axes that shrink and whose units a criterion chooses: not those of a rotated stream."""
    widths = [axis for axis in _WIDTHS if after.get(axis) != checkpoint.shape.get(axis)]
    if rotated:
        require_rotatable(checkpoint)
        windows.file("the stream's basis")
        widths.remove("hidden")
    return widths


def _vocabulary(checkpoint: Checkpoint, after: Shape, windows: _Windows) -> dict[str, Indices]:
    """The tokens that stay, if some are to go."""
    if after["vocab"] == checkpoint.shape["vocab"]:
        return {}
    from shearling.pruning.vocabulary import choose_tokens

    text = documents(windows.file("a smaller vocabulary"))
    return {"vocab": choose_tokens(checkpoint.path, text, after["vocab"])}


def prune_to(
    checkpoint: Checkpoint,
    choice: Choice,
    output: Path,
    *,
    calibration: Calibration | None = None,
    repaired: bool = True,
    stream: bool | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> Checkpoint:
    """Cut to a choice, repaired if asked, and prove it.

    Raises:
        ShearlingError: as :func:`shearling.repair.refit.refit` and
            :func:`shearling.pruning.cut.cut`.
    """
    check_output(output)  # what would be refused at the end, before minutes of repair
    check_space(output, written_bytes(checkpoint, choice.keep))
    options = dict(choice.options)
    with tempfile.TemporaryDirectory(prefix="shearling-") as scratch:
        solved: Repair | None = None
        cuttable, reference = checkpoint, None
        if choice.rotated:
            assert calibration is not None, "a choice in a rotated stream is made with text"
            turned = rotate(
                checkpoint, calibration.windows(checkpoint), len(choice.keep.model["hidden"]),
                Path(scratch) / "rotated", stream=stream, shard_bytes=shard_bytes,
                progress=progress,
            )  # fmt: skip
            cuttable, reference = turned.cuttable, turned.exact
            options["rotation"] = dict(turned.figures)
        if repaired:
            if calibration is None:
                raise ShearlingError(
                    "a repair runs the model on text; give --calibration FILE, or --no-refit."
                )
            ids_NS = repair_text(checkpoint, calibration, stream=stream, progress=progress)
            solved = refit(
                cuttable, choice.keep, ids_NS, Path(scratch), reference=reference,
                windows=calibration.samples, stream=stream, progress=progress,
            )  # fmt: skip
            options["repair"] = solved.as_json()
        return cut(
            cuttable, choice.keep, output, replaced=solved.replaced if solved else None,
            options=options, seed=calibration.seed if calibration else None, stream=stream,
            shard_bytes=shard_bytes, progress=progress,
        )  # fmt: skip


class _Windows:
    """Calibration windows, read once when they are first needed."""

    def __init__(self, checkpoint: Checkpoint, calibration: Calibration | None) -> None:
        self._checkpoint, self._calibration = checkpoint, calibration
        self._ids: Tensor | None = None

    def file(self, what: str) -> Path:
        if self._calibration is None:
            raise ShearlingError(f"{what} is chosen by a text; give --calibration FILE.")
        return self._calibration.file

    def of(self, by: str) -> Tensor:
        if self._calibration is None:
            raise ShearlingError(f"criterion {by} runs the model on text; give --calibration FILE.")
        if self._ids is None:
            self._ids = self._calibration.windows(self._checkpoint)
        return self._ids

    def of_units(self, by: str) -> Tensor:
        """The windows, or no tokens for a criterion that looks at none."""
        return torch.zeros(0, 0, dtype=torch.long) if by in TEXTLESS else self.of(by)


def _check_blocks(
    checkpoint: Checkpoint,
    by: str,
    windows: _Windows,
    protect: tuple[int, int] | None,
    remove: int,
) -> None:
    """Raise ShearlingError if blocks cannot be scored so."""
    name, protected = protected_blocks(by, protect, checkpoint.shape["layers"], remove)
    if name != "magnitude":
        sequences = len(windows.of(by))
        if name == "repair":
            run_starts(checkpoint, sequences, protected, remove)


def _score_blocks(
    blocks: BlockStream,
    by: str,
    windows: _Windows,
    protect: tuple[int, int] | None,
    remove: int,
    progress: Progress,
) -> Scores:
    name, protected = protected_blocks(by, protect, blocks.depth, remove)
    if name == "magnitude":
        scores = magnitude(blocks.checkpoint, protected=protected, progress=progress)
    else:
        ids_NS = windows.of(by)
        if name != "repair":
            ids_NS = ids_NS[:BLOCK_SAMPLES, :BLOCK_LENGTH]
        scores = score_tokens(
            blocks, name, ids_NS, protected=protected, remove=remove, progress=progress
        )
    return replace(require_finite(scores, blocks.checkpoint, by), criterion=by)
