"""From a target shape to a repaired checkpoint: score, choose, refit and cut, joined.

What is removed follows from a criterion for blocks and one for units; each has a default that is
the best we measured (docs/one_shot.md). The calibration windows serve the criteria as they are,
and the repair together with copies that the source model rewrote in part, and more that it wrote.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from shearling.data.bos import TokenWindows
from shearling.data.documents import documents
from shearling.engine.place import Need, Place
from shearling.engine.ranks import Ranks
from shearling.engine.stream import BlockStream
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.files.scratch import scratch
from shearling.files.writer import check_output, check_space, claimed
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.choose import account, keep_layers, keep_units
from shearling.pruning.cut import SHARD_BYTES, cut, written_bytes
from shearling.pruning.pattern import Pattern
from shearling.repair.calibration import Calibration, repair_text
from shearling.repair.experts import ExpertOptions
from shearling.repair.refit import KEPT_WIDTHS, refit
from shearling.repair.result import Repair
from shearling.repair.rotate import require_rotatable, rotate
from shearling.scoring.registry import criteria_for, find
from shearling.scoring.score import NO_TOKENS, protected_blocks, score_tokens, score_weights
from shearling.scoring.score_experts import EXPERT_AXES, score_experts
from shearling.scoring.score_units import score_units
from shearling.scoring.scores import Scores
from shearling.table.values import Cut, Indices, Keep, Shape

_WIDTHS = ("hidden", "heads", "kv_heads", "linear_heads", "mlp", *EXPERT_AXES)


@dataclass(frozen=True, slots=True)
class Choice:
    """What is to survive, and how that came about.

    Attributes:
        keep: the choice.
        options: for the manifest.
        rotated: whether ``keep`` has the first channels of a rotated stream, not the source's own.
        final_norm: whether a repair fits the final norm's gain.
        experts: how a repair mends those of a mixture.
    """

    keep: Keep
    options: Mapping[str, Any]
    rotated: bool = False
    final_norm: bool = True
    experts: ExpertOptions = field(default_factory=ExpertOptions)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a cut is to be, and how it is chosen.

    Attributes:
        after: every axis with its size after the cut.
        by: criteria, as in :func:`shearling.scoring.registry.criteria_for`.
        scores: of blocks, if they are known already.
        keep_blocks: the surviving blocks, if they are chosen already.
        repaired: whether a repair will follow.
        rotated: cut ``hidden``, if it shrinks, in the stream's principal basis
            (:mod:`shearling.repair.rotate`); no criterion then chooses channels.
        final_norm: whether a repair fits the final norm's gain.
        experts: how a repair mends those of a mixture.
        protect: how many of the first and of the last blocks are never removed.
        pattern: the removal must leave the blocks in this.
    """

    after: Shape
    by: str | None = None
    scores: Scores | None = None
    keep_blocks: Keep | None = None
    repaired: bool = True
    rotated: bool = False
    final_norm: bool = True
    experts: ExpertOptions = field(default_factory=ExpertOptions)
    protect: tuple[int, int] | None = None
    pattern: Pattern | None = None


class Run:
    """One model and one text on their way through a command.

    The model is opened once as a running one, and the text tokenised once, when first needed.

    Attributes:
        source: the model.
        calibration: the text; criteria by magnitude and at random need none.
        place: where blocks run.
        progress: told how far the work is.
    """

    def __init__(
        self,
        source: Checkpoint,
        calibration: Calibration | None = None,
        *,
        place: Place | None = None,
        progress: Progress = silent,
    ) -> None:
        """Nothing is read yet."""
        self.source, self.calibration = source, calibration
        self.place = place or Place.best(source, need=repair_need(source, calibration))
        self.progress = progress

    @cached_property
    def stream(self) -> BlockStream:
        """The running model."""
        return BlockStream(self.source, self.place)

    @cached_property
    def windows(self) -> TokenWindows:
        """Calibration tokens (samples, length)."""
        assert self.calibration is not None
        return self.calibration.windows(self.source)

    @property
    def seed(self) -> int:
        """Of every random choice."""
        return self.calibration.seed if self.calibration else 0

    def text_for(self, by: str) -> Tensor:
        """The windows, for a criterion or a repair (ShearlingError if there is no text)."""
        if self.calibration is None:
            raise ShearlingError(f"criterion {by} runs the model on text; give --calibration FILE.")
        return self.windows.ids_NS

    def text_for_units(self, by: str) -> Tensor:
        """The windows, or no tokens for a criterion that looks at none."""
        return NO_TOKENS if find(by, "units").textless else self.text_for(by)

    def file_for(self, purpose: str) -> Path:
        """The text itself (ShearlingError if there is none)."""
        if self.calibration is None:
            raise ShearlingError(f"{purpose} is chosen by a text; give --calibration FILE.")
        return self.calibration.file

    def choose(self, wanted: Wanted) -> Choice:
        """Choose what survives a cut.

        What can be refused is refused before the model is read.

        Raises:
            ShearlingError: an impossible shape, an unknown criterion, no text where one is needed.
        """
        started = time.perf_counter()
        before, after = self.source.shape, wanted.after
        self.source.family.check(self.source.config, after)
        criteria = criteria_for(wanted.by, self.source, repaired=wanted.repaired)
        by_blocks, by_units, by_experts = criteria
        rotated = wanted.rotated and after["hidden"] < before["hidden"]
        widths = _widths(self, after, rotated=rotated)
        keep, scores = wanted.keep_blocks or Keep(), wanted.scores
        remove = before["layers"] - after["layers"] if wanted.keep_blocks is None else 0
        kinds = self.source.layout.kinds
        if remove and scores is not None:
            keep = keep_layers(scores, after["layers"], wanted.pattern, kinds=kinds)
        scoring = remove > 0 and scores is None
        if scoring:
            _check_blocks(self, by_blocks, wanted.protect, remove)
        of_units = [axis for axis in widths if axis not in EXPERT_AXES]
        of_experts = [axis for axis in widths if axis in EXPERT_AXES]
        ids_NS = self.text_for_units(by_units) if of_units else None
        if of_experts:
            ids_NS = self.text_for(by_experts)
        if wanted.repaired and self.calibration is not None:
            self.text_for("repair")  # not as a criterion
        vocab = _vocabulary(self, after)
        if scoring:
            scores = _score_blocks(self, by_blocks, wanted.protect, remove)
            keep = keep_layers(scores, after["layers"], wanted.pattern, kinds=kinds)
        options = account(keep, before["layers"], scores) if "layers" in keep.model else {}
        if ids_NS is not None:
            scored: dict[str, Scores] = {}
            if of_units:
                scored = score_units(
                    self.stream, by_units, ids_NS, of_units, seed=self.seed, progress=self.progress
                )
                options |= {"unit_criterion": by_units}
            if of_experts:
                scored |= score_experts(
                    self.stream, by_experts, ids_NS, of_experts, progress=self.progress
                )
                options |= {"expert_criterion": by_experts}
            units = _keep_units(self.source, scored, keep, after, rotated=rotated)
            keep = Keep({**keep.model, **units.model}, units.blocks)
        hidden = {"hidden": tuple(range(after["hidden"]))} if rotated else {}
        keep = replace(keep, model={**keep.model, **hidden, **vocab})
        if self.calibration is not None:
            read = {"bos": self.windows.bos is not None} if "windows" in vars(self) else {}
            options["calibration"] = self.calibration.as_json() | read
        options["seconds_choosing"] = round(time.perf_counter() - started, 2)
        agreed = _agreed(self.place.ranks, keep)
        return Choice(agreed, options, rotated, wanted.final_norm, wanted.experts)

    def write(
        self, choice: Choice, output: Path, *, repaired: bool = True, shard_bytes: int = SHARD_BYTES
    ) -> Checkpoint:
        """Cut to a choice, repaired if asked, and prove it; the first rank alone writes.

        Raises:
            ShearlingError: as :func:`shearling.repair.refit.refit` and
                :func:`shearling.pruning.cut.cut`.
        """
        check_output(output)
        expanded = self.source.layout.cut(choice.keep, self.source.shape)
        check_space(output, written_bytes(self.source, expanded))
        if repaired and self.calibration is None:
            raise ShearlingError(
                "a repair runs the model on text; give --calibration FILE, or --no-refit."
            )
        ranks, options = self.place.ranks, dict(choice.options)
        ranks.barrier()  # nothing is written before all have looked
        with claimed(output) if ranks.first else nullcontext(), scratch() as directory:
            cuttable, exact = self.source, self.source
            if choice.rotated:
                turned = rotate(
                    self.stream, self.windows.ids_NS, len(choice.keep.model["hidden"]),
                    directory / "rotated", shard_bytes=shard_bytes, progress=self.progress,
                )  # fmt: skip
                options["rotation"] = dict(turned.figures)
                cuttable, exact = turned.cuttable, turned.exact
            solved = None
            if repaired:
                solved = self._repair(expanded, cuttable, exact, directory, choice)
                if choice.experts != ExpertOptions():
                    options["expert_repair"] = asdict(choice.experts)
                options["repair"] = solved.as_json()
            written = None
            if ranks.first:
                written = cut(
                    cuttable, expanded, output, replaced=solved.replaced if solved else None,
                    options=options, seed=self.calibration.seed if self.calibration else None,
                    place=self.place, shard_bytes=shard_bytes, progress=self.progress,
                )  # fmt: skip
        ranks.wait_for(output)
        return written or Checkpoint.open(output)

    def _repair(
        self, expanded: Cut, cuttable: Checkpoint, exact: Checkpoint, directory: Path,
        choice: Choice,
    ) -> Repair:  # fmt: skip
        """Solve what a cut of ``cuttable`` leaves anew, towards ``exact``, the source's equal."""
        assert self.calibration is not None
        ids_NS = repair_text(self.stream, self.calibration, self.windows, progress=self.progress)
        source = (
            self.stream
            if exact is self.source
            else BlockStream(exact, replace(self.place, tell=None))
        )
        return refit(
            source, expanded, ids_NS, directory, cuttable=cuttable,
            windows=self.calibration.samples, final_norm=choice.final_norm,
            experts=choice.experts, progress=self.progress,
        )  # fmt: skip


def _agreed(ranks: Ranks, keep: Keep) -> Keep:
    """The first rank's choice: ranks on different processors may round differently."""
    if ranks.size == 1:
        return keep
    model, blocks = ranks.agreed([dict(keep.model), dict(keep.blocks)])
    return Keep(
        {axis: tuple(kept) for axis, kept in model.items()},
        {axis: tuple(map(tuple, rows)) for axis, rows in blocks.items()},
    )


def repair_need(source: Checkpoint, calibration: Calibration | None) -> Need:
    """What a repair keeps of its text between two blocks; a criterion keeps less."""
    if calibration is None:
        return Need()
    copies = 1 + len(calibration.shares)
    sequences = copies * calibration.samples + calibration.sequences
    shape = source.shape
    linear = shape.get("linear_heads", 0) * shape.get("linear_value_dim", 0)
    widest = max(shape.get("mlp", 0), shape["heads"] * shape["head_dim"], linear)
    return Need(sequences * calibration.length, KEPT_WIDTHS * shape["hidden"] + widest)


def _keep_units(
    source: Checkpoint, scores: Mapping[str, Scores], keep: Keep, after: Shape, *, rotated: bool
) -> Keep:
    """The units that survive on the axes that shrink."""
    before, layout = source.shape, source.layout
    layers = keep.model.get("layers", tuple(range(before["layers"])))
    scored = after.with_(hidden=before["hidden"]) if rotated else after
    return keep_units(scores, layout, before, scored, layers)


def _widths(run: Run, after: Shape, *, rotated: bool) -> list[str]:
    """The axes that shrink and whose units a criterion chooses: not those of a rotated stream."""
    widths = [axis for axis in _WIDTHS if after.get(axis) != run.source.shape.get(axis)]
    if rotated:
        require_rotatable(run.source)
        if run.place.ranks.size > 1:
            raise ShearlingError(
                f"{run.place.ranks.size} processes were started, but the rotation of hidden "
                "channels is one process's work; start one, or use --no-rotate."
            )
        run.file_for("the stream's basis")
        widths.remove("hidden")
    return widths


def _vocabulary(run: Run, after: Shape) -> dict[str, Indices]:
    """The tokens that stay, if some are to go."""
    if after["vocab"] == run.source.shape["vocab"]:
        return {}
    from shearling.pruning.vocabulary import choose_tokens

    text = documents(run.file_for("a smaller vocabulary"))
    return {"vocab": choose_tokens(run.source.path, text, after["vocab"])}


def _check_blocks(run: Run, by: str, protect: tuple[int, int] | None, remove: int) -> None:
    """Raise ShearlingError if blocks cannot be scored so."""
    criterion = find(by, "blocks")
    protected = protected_blocks(run.source, by, protect, remove)
    if not criterion.textless:
        criterion.refuse(run.source, len(run.text_for(by)), protected, remove)


def _score_blocks(run: Run, by: str, protect: tuple[int, int] | None, remove: int) -> Scores:
    criterion = find(by, "blocks")
    protected = protected_blocks(run.source, by, protect, remove)
    if criterion.textless:  # no model is built
        return score_weights(run.source, by, protected=protected, progress=run.progress)
    ids_NS = run.text_for(by)
    if criterion.windows is not None:
        samples, length = criterion.windows
        ids_NS = ids_NS[:samples, :length]
    return score_tokens(
        run.stream, by, ids_NS, protected=protected, remove=remove, progress=run.progress
    )
