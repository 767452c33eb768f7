"""What survives of each of several cuts of one model, scored once for all of them.

Scores of units do not depend on a cut's size, and those of blocks only by criteria that have to
know how many go; these share what they can (:func:`shearling.scoring.score.score_removals`). A
single cut is the same with one size.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from shearling.engine.ranks import Ranks
from shearling.errors import ShearlingError
from shearling.pruning.choose import account, keep_layers, keep_units
from shearling.pruning.nested import require_nested
from shearling.pruning.pattern import Pattern
from shearling.repair.experts import ExpertOptions
from shearling.repair.rotate import require_rotatable
from shearling.scoring.registry import criteria_for, find
from shearling.scoring.score import protected_blocks, score_removals, score_weights
from shearling.scoring.score_experts import EXPERT_AXES, score_experts
from shearling.scoring.score_units import score_units
from shearling.scoring.scores import Scores
from shearling.table.values import Indices, Keep, Shape

if TYPE_CHECKING:
    from shearling.pruning.run import Run

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
        account: how the sizes came about, for the manifest.
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
    account: Mapping[str, Any] = field(default_factory=dict)


def choose_all(run: Run, wanted: Sequence[Wanted], *, nested: bool = False) -> list[Choice]:
    """Choose what survives of each cut.

    What can be refused is refused before the model is read.

    Args:
        run: the model and the text.
        wanted: the cuts; where they are nested, the largest first.
        nested: whether each is to keep only what the one before it keeps.

    Raises:
        ShearlingError: an impossible shape, an unknown criterion, no text where one is needed, or
            choices that cannot be nested.
    """
    started = time.perf_counter()
    cuts = check_all(run, wanted)
    _score_blocks(run, [cut for cut in cuts if cut.scoring])
    within: Keep | None = None
    for cut in cuts:
        cut.keep_blocks(within)
        within = cut.keep if nested else None
    of_units = _score_units(run, [cut for cut in cuts if cut.of_units])
    of_experts = _score_experts(run, [cut for cut in cuts if cut.of_experts])
    within = None
    for cut in cuts:
        cut.keep_units(of_units | of_experts, within)
        if within is not None:
            require_nested(cut.keep, within, run.source, cut.after)
        within = cut.keep if nested else None
    seconds = round(time.perf_counter() - started, 2)
    return [cut.choice(seconds) for cut in cuts]


def check_all(run: Run, wanted: Sequence[Wanted]) -> list[_Chosen]:
    """Cuts to be chosen, checked: what can be refused before the model is read is refused here.

    Raises:
        ShearlingError: as :func:`choose_all`.
    """
    return [_Chosen(run, one) for one in wanted]


class _Chosen:
    """One cut while it is chosen."""

    def __init__(self, run: Run, wanted: Wanted) -> None:
        """Settle what is to be scored, and refuse what cannot be."""
        self.run, self.wanted, self.after = run, wanted, wanted.after
        source = run.source
        before, after = source.shape, wanted.after
        source.family.check(source.config, after)
        criteria = criteria_for(wanted.by, source, repaired=wanted.repaired)
        self.by_blocks, self.by_units, self.by_experts = criteria
        self.rotated = wanted.rotated and after["hidden"] < before["hidden"]
        widths = _widths(run, after, rotated=self.rotated)
        self.keep, self.scores = wanted.keep_blocks or Keep(), wanted.scores
        self.remove = before["layers"] - after["layers"] if wanted.keep_blocks is None else 0
        if self.remove and self.scores is not None:
            self.keep_blocks(None)
        self.scoring = self.remove > 0 and self.scores is None
        if self.scoring:
            _check_blocks(run, self.by_blocks, wanted.protect, self.remove)
        self.of_units = [axis for axis in widths if axis not in EXPERT_AXES]
        self.of_experts = [axis for axis in widths if axis in EXPERT_AXES]
        if self.of_units:
            run.text_for_units(self.by_units)
        if self.of_experts:
            run.text_for(self.by_experts)
        if wanted.repaired and run.calibration is not None:
            run.text_for("repair")  # not as a criterion
            _ = run.openings  # refused now, if at all
        self.vocab = _vocabulary(run, after)
        self.options: dict[str, Any] = {}

    def keep_blocks(self, within: Keep | None) -> None:
        """Keep the blocks that the scores say, of those that ``within`` keeps."""
        if not self.remove:
            return
        assert self.scores is not None
        depth, kinds = self.run.source.shape["layers"], self.run.source.layout.kinds
        kept = range(depth) if within is None else within.model.get("layers", range(depth))
        gone = tuple(block for block in range(depth) if block not in kept)
        layers, pattern = self.after["layers"], self.wanted.pattern
        if len(gone) == self.remove:
            self.keep = Keep({"layers": tuple(kept)})
            return
        self.keep = keep_layers(self.scores, layers, pattern, kinds=kinds, gone=gone)
        if not set(self.keep.model["layers"]) <= set(kept):
            raise ShearlingError(
                f"--nested: no {self.remove} of {depth} blocks can go that hold those of the next "
                f"larger size ({', '.join(map(str, gone))}) and leave the others in the pattern "
                "that --keep-pattern keeps; leave out one of the two, or ask for other sizes."
            )

    def keep_units(self, scored: Mapping[tuple[str, str], Scores], within: Keep | None) -> None:
        """Keep the units that the scores of (criterion, axis) say, of those of ``within``."""
        source, keep = self.run.source, self.keep
        before = source.shape
        if "layers" in keep.model:
            self.options = account(keep, before["layers"], self.scores)
        by = dict.fromkeys(self.of_units, self.by_units)
        by |= dict.fromkeys(self.of_experts, self.by_experts)
        if by:
            scores = {axis: scored[criterion, axis] for axis, criterion in by.items()}
            layers = keep.model.get("layers", tuple(range(before["layers"])))
            after = self.after.with_(hidden=before["hidden"]) if self.rotated else self.after
            units = keep_units(scores, source.layout, before, after, layers, within)
            keep = Keep({**keep.model, **units.model}, units.blocks)
        if self.of_units:
            self.options |= {"unit_criterion": self.by_units}
        if self.of_experts:
            self.options |= {"expert_criterion": self.by_experts}
        hidden = {"hidden": tuple(range(self.after["hidden"]))} if self.rotated else {}
        self.keep = replace(keep, model={**keep.model, **hidden, **self.vocab})

    def choice(self, seconds: float) -> Choice:
        """What was chosen in so many seconds."""
        run, wanted, options = self.run, self.wanted, self.options
        if run.calibration is not None:
            read = {"bos": run.windows.bos is not None} if "windows" in vars(run) else {}
            options["calibration"] = run.calibration.as_json() | read
        options["seconds_choosing"] = seconds
        options |= wanted.account
        agreed = _agreed(run.place.ranks, self.keep)
        return Choice(agreed, options, self.rotated, wanted.final_norm, wanted.experts)


def _score_blocks(run: Run, cuts: Sequence[_Chosen]) -> None:
    """Score the blocks of the source for some cuts; those alike but for their size together."""
    groups: dict[tuple[str, tuple[int, ...]], list[_Chosen]] = {}
    for cut in cuts:
        protected = protected_blocks(run.source, cut.by_blocks, cut.wanted.protect, cut.remove)
        groups.setdefault((cut.by_blocks, protected), []).append(cut)
    for (by, protected), alike in groups.items():
        criterion = find(by, "blocks")
        if criterion.textless:  # no model is built
            scores = score_weights(run.source, by, protected=protected, progress=run.progress)
            scored = [scores] * len(alike)
        else:
            ids_NS = _cut_to(run.text_for(by), criterion.windows)
            scored = score_removals(
                run.stream, by, ids_NS, [cut.remove for cut in alike], protected=protected,
                progress=run.progress,
            )  # fmt: skip
        for cut, scores in zip(alike, scored, strict=True):
            cut.scores = scores


def _score_units(run: Run, cuts: Sequence[_Chosen]) -> dict[tuple[str, str], Scores]:
    """Scores by criterion and axis, of all axes on which some cut shrinks."""
    scored: dict[tuple[str, str], Scores] = {}
    for by, axes in _axes((cut.by_units, cut.of_units) for cut in cuts).items():
        ids_NS = run.text_for_units(by)
        by_axis = score_units(run.stream, by, ids_NS, axes, seed=run.seed, progress=run.progress)
        scored |= {(by, axis): scores for axis, scores in by_axis.items()}
    return scored


def _score_experts(run: Run, cuts: Sequence[_Chosen]) -> dict[tuple[str, str], Scores]:
    scored: dict[tuple[str, str], Scores] = {}
    for by, axes in _axes((cut.by_experts, cut.of_experts) for cut in cuts).items():
        by_axis = score_experts(run.stream, by, run.text_for(by), axes, progress=run.progress)
        scored |= {(by, axis): scores for axis, scores in by_axis.items()}
    return scored


def _axes(asked: Iterable[tuple[str, list[str]]]) -> dict[str, list[str]]:
    """By criterion, all axes asked for, in the order of the table."""
    by: dict[str, set[str]] = {}
    for name, axes in asked:
        by.setdefault(name, set()).update(axes)
    return {name: [axis for axis in _WIDTHS if axis in axes] for name, axes in by.items()}


def _cut_to(ids_NS: Tensor, windows: tuple[int, int] | None) -> Tensor:
    """As many sequences and tokens of each as a criterion is given at most."""
    if windows is None:
        return ids_NS
    samples, length = windows
    return ids_NS[:samples, :length]


def _agreed(ranks: Ranks, keep: Keep) -> Keep:
    """The first rank's choice: ranks on different processors may round differently."""
    if ranks.size == 1:
        return keep
    model, blocks = ranks.agreed([dict(keep.model), dict(keep.blocks)])
    return Keep(
        {axis: tuple(kept) for axis, kept in model.items()},
        {axis: tuple(map(tuple, rows)) for axis, rows in blocks.items()},
    )


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
        run.text_that_chooses("the stream's basis")
        widths.remove("hidden")
    return widths


def _vocabulary(run: Run, after: Shape) -> dict[str, Indices]:
    """The tokens that stay, if some are to go."""
    if after["vocab"] == run.source.shape["vocab"]:
        return {}
    from shearling.pruning.vocabulary import choose_tokens

    text = run.text_that_chooses("a smaller vocabulary").documents(run.source)
    return {"vocab": choose_tokens(run.source.path, text, after["vocab"])}


def _check_blocks(run: Run, by: str, protect: tuple[int, int] | None, remove: int) -> None:
    """Raise ShearlingError if blocks cannot be scored so."""
    criterion = find(by, "blocks")
    protected = protected_blocks(run.source, by, protect, remove)
    if not criterion.textless:
        criterion.refuse(run.source, len(run.text_for(by)), protected, remove)
