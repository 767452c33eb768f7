"""Everything that ``shearling prune`` does, as one call: score, choose, repair, cut and prove.

The command and the API's ``prune`` are both a :class:`Pruning`: what was asked for, with every
default settled by what the source allows.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from shearling.engine.peak import Peak, shortage
from shearling.engine.place import Place, Wish
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.files.writer import check_output, check_outside, claimed
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.choices import Wanted
from shearling.pruning.cut import SHARD_BYTES
from shearling.pruning.exportable import tell_limits
from shearling.pruning.run import Run, repair_need
from shearling.pruning.settle import (
    Notify,
    settle_experts,
    settle_final_norm,
    settle_pattern,
    settle_repaired,
    settle_rotated,
    settle_size,
    settle_words,
    tell_ignored,
    tell_pattern,
    tell_unused,
)
from shearling.pruning.size import Size
from shearling.pruning.text import CalibrationText
from shearling.repair.calibration import Calibration
from shearling.scoring.registry import criteria_for, protection
from shearling.scoring.scores import Scores
from shearling.table.values import Shape


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Criteria:
    """By what the units that go are chosen.

    Attributes:
        by: criteria, as in :func:`shearling.scoring.registry.criteria_for`; None takes the best.
        scores: of blocks, if they are known already; a file of ``shearling score``, or a value.
        protect_first: so many of the first blocks never go; None leaves it to the criterion.
        protect_last: the same of the last ones.
        keep_pattern: only blocks go whose removal leaves each other one of the kind that llama.cpp
            takes it for by its number (:mod:`shearling.pruning.pattern`).
    """

    by: str | None = None
    scores: Scores | Path | None = None
    protect_first: int | None = None
    protect_last: int | None = None
    keep_pattern: bool = False

    def __post_init__(self) -> None:
        """Refuse two ways to choose blocks."""
        if self.by is not None and self.scores is not None:
            raise ShearlingError("--by and --scores were both given; choose one.")

    @property
    def protect_given(self) -> dict[str, int | None]:
        """By the names of the options, for warnings."""
        return {"--protect-first": self.protect_first, "--protect-last": self.protect_last}

    def protect(self, by: str) -> tuple[int, int] | None:
        """How many of the first and last blocks stay under the criterion ``by``, if it is said."""
        return protection(by, self.protect_first, self.protect_last)


@dataclass(frozen=True, slots=True, kw_only=True)
class Repairs:
    """What is mended; None does so wherever it is possible.

    Attributes:
        refit: solve the matrices that write into the residual stream anew.
        rotate: cut hidden channels in the stream's principal axes.
        final_norm: fit the final norm's gain behind a refit.
        router: let the rows of a mixture's router move in a refit as well, where held-out tokens
            gain by that; not done by default, as it gained nothing where we measured.
        merge_experts: fold experts that go into those that stay before the refit; likewise.
    """

    refit: bool | None = None
    rotate: bool | None = None
    final_norm: bool | None = None
    router: bool = False
    merge_experts: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """How the work is done.

    Attributes:
        wish: where the source is to run, in what type and in how much memory.
        shard_bytes: the largest weight file.
        progress: told how far the work is.
        notify: told, in a sentence each, what the user should know.
    """

    wish: Wish = field(default_factory=Wish)
    shard_bytes: int = SHARD_BYTES
    progress: Progress = silent
    notify: Notify = _warn


def prune(
    source: Checkpoint,
    output: Path,
    size: Size,
    *,
    calibration: CalibrationText | None = None,
    criteria: Criteria | None = None,
    repairs: Repairs | None = None,
    running: Running | None = None,
) -> Checkpoint:
    """Cut a model to a shape or a size, repair it, and prove that it is what it claims.

    Args:
        source: the model; nothing of it is written to.
        output: a new directory for the smaller one.
        size: how much is left.
        calibration: text; criteria by magnitude and at random need none, and without it nothing is
            repaired.
        criteria: by what is chosen; by default the best that we measured.
        repairs: what is mended; by default all that can be.
        running: how the work is done, and who is told.

    Returns:
        The smaller model, with its manifest.

    Raises:
        ShearlingError: an impossible or unclear request, no text where one is needed, a source
            that cannot be cut, or a cut whose proof fails.
    """
    check_output(output)
    check_outside(output, source.path)
    pruning = Pruning.of(
        source, size, calibration=calibration, criteria=criteria, repairs=repairs, running=running
    )
    running = running or Running()
    run = pruning.run(running.progress)
    with claimed(output):
        choice = run.choose(pruning.wanted)
        tell_pattern(source, choice.keep, running.notify)
        return run.write(
            choice, output, repaired=pruning.wanted.repaired, shard_bytes=running.shard_bytes
        )


@dataclass(frozen=True, slots=True)
class Pruning:
    """A cut that was asked for, checked, with every default settled.

    Attributes:
        source: the model.
        wanted: what the cut is to be, and how it is chosen.
        calibration: text, if there is any.
        place: where the source runs.
    """

    source: Checkpoint
    wanted: Wanted
    calibration: Calibration | None
    place: Place

    @staticmethod
    def of(
        source: Checkpoint,
        size: Size,
        *,
        calibration: CalibrationText | None = None,
        criteria: Criteria | None = None,
        repairs: Repairs | None = None,
        running: Running | None = None,
    ) -> Pruning:
        """Check and settle, before any work; arguments and errors as :func:`prune`."""
        (pruning,) = prunings(
            source, [size], calibration=calibration, criteria=criteria, repairs=repairs,
            running=running,
        )  # fmt: skip
        return pruning

    def peak(self, cuts: int = 1) -> Peak:
        """The memory of the device that it will take, of so many cuts that are made together."""
        text, wanted = self.calibration, self.wanted
        return Peak.of(
            self.source, self.place, repair_need(self.source, text, cuts), wanted.after,
            scored=0 if text is None else text.samples * text.length, repaired=wanted.repaired,
        )  # fmt: skip

    def check(self) -> None:
        """Refuse all that the cut would refuse before the model is opened (ShearlingError)."""
        self.run().check([self.wanted])

    def run(self, progress: Progress = silent, tell: Notify | None = None) -> Run:
        """The model and the text, ready to choose and to write; ``tell`` is told the place."""
        place = replace(self.place, tell=tell)
        return Run(self.source, self.calibration, place=place, progress=progress)


def prunings(
    source: Checkpoint,
    sizes: Sequence[Size],
    *,
    calibration: CalibrationText | None = None,
    criteria: Criteria | None = None,
    repairs: Repairs | None = None,
    running: Running | None = None,
) -> list[Pruning]:
    """Check and settle a cut to each of some sizes; they share the text and the place.

    Raises:
        ShearlingError: as :func:`prune`.
    """
    criteria, repairs = criteria or Criteria(), repairs or Repairs()
    running = running or Running()
    notify, wish = _once(running.notify), running.wish
    for size in sizes:
        if size.remove is not None and (criteria.by is not None or criteria.scores is not None):
            raise ShearlingError("--remove names the blocks itself; leave out --by and --scores.")
    text, place = None, None
    if calibration is not None:
        text, place = calibration.settled(source, wish, notify, len(sizes))
    read = None if text is None else partial(text.documents, source)
    sized = [settle_size(size, source, read, notify) for size in sizes]
    refit = settle_words(repairs.refit, source, [after for after, _ in sized], text)
    repaired = settle_repaired(refit, text, notify)
    settle = _Settle(source, text, criteria, repairs, repaired, notify)
    wanted = [settle.wanted(size, *of) for size, of in zip(sizes, sized, strict=True)]
    place = place or Place.best(source, wish)
    asked = [Pruning(source, one, text, place) for one in wanted]
    largest = max((one.peak(len(asked)) for one in asked), key=lambda peak: peak.total)
    if short := shortage(largest, place):
        notify(short)
    return asked


@dataclass(frozen=True, slots=True)
class _Settle:
    """What cuts of several sizes are told alike."""

    source: Checkpoint
    text: Calibration | None
    criteria: Criteria
    repairs: Repairs
    repaired: bool
    notify: Notify

    def wanted(self, size: Size, after: Shape, account: Mapping[str, Any]) -> Wanted:
        """What a cut to one size is to be, its options checked."""
        source, criteria, repairs = self.source, self.criteria, self.repairs
        repaired, notify = self.repaired, self.notify
        keep_blocks = size.keep_blocks(source)
        rotated = settle_rotated(repairs.rotate, source, after, self.text, notify)
        final_norm = settle_final_norm(repairs.final_norm, repaired=repaired, notify=notify)
        experts = settle_experts(repairs, source, after, repaired=repaired, notify=notify)
        tell_unused(source, after, criteria, rotated=rotated, notify=notify)
        pattern = settle_pattern(source, after, size, criteria, notify)
        tell_limits(source, after, notify)
        scores = criteria.scores
        if isinstance(scores, Path):
            scores = load_scores(scores, source, notify)
        chosen = scores is not None or keep_blocks is not None
        if chosen and after["layers"] < source.shape["layers"]:
            tell_ignored(notify, criteria.protect_given, "the blocks are already chosen")
        by_blocks, *_ = criteria_for(criteria.by, source, repaired=repaired)
        return Wanted(
            after, by=criteria.by, scores=scores, keep_blocks=keep_blocks, repaired=repaired,
            rotated=rotated, final_norm=final_norm, experts=experts,
            protect=criteria.protect(by_blocks), pattern=pattern, account=account,
        )  # fmt: skip


def _once(notify: Notify) -> Notify:
    """What is said of several sizes is said once."""
    said: set[str] = set()

    def tell(sentence: str) -> None:
        if sentence not in said:
            said.add(sentence)
            notify(sentence)

    return tell


def load_scores(file: Path, source: Checkpoint, notify: Notify) -> Scores:
    """Scores of blocks from a file, with a warning if they were taken on another model."""
    scores = Scores.load(file)
    if scores.axis != "layers":
        raise ShearlingError(
            f"{file} scores units of {scores.axis}, but --scores takes scores of layers; make them "
            "with: shearling score MODEL --calibration FILE --output scores.json."
        )
    scores.require(source.layout, source.shape, file=file)
    scored = scores.details.get("model") or {}
    if scored.get("fingerprint") not in (None, source.fingerprint):
        notify(
            f"{file} scores {scored.get('name')}, whose weights or configuration differ from "
            f"those of {source.name}."
        )
    return scores
