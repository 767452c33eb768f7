"""Loss after repair: which run of blocks can go, given that the block before it will stand in.

For each place where a run of blocks could be taken out, the down-projection before the gap is
solved anew (shearling.engine.moments) so that the stream after it is nearest to the stream after
the gap, and the perplexity of the model so repaired is measured on sequences held out from the
solution. Neighbours are removed together: the repair bridges one gap better than many
(LOG.md, 2026-11-22).
All places are tried in one walk: the source's stream and, past each gap, the held-out states of
the model without it, so that every block's weights are read once. Runs of several lengths, for
cuts of several sizes, are tried in the same walk.

Shapes: N sequences of S positions, in batches of B; D hidden, K columns of the writer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shearling.engine.branches import branches, watching
from shearling.engine.moments import HELD_OUT, Moments, correct, held_apart, inverse_energy
from shearling.engine.states import MAIN, Key, States
from shearling.engine.stream import BlockStream
from shearling.engine.walk import Step, Text, forward
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.model.checkpoint import Checkpoint
from shearling.scoring.blocks.perplexity import exp_of
from shearling.scoring.registry import criterion, repairable
from shearling.scoring.scores import Scores
from shearling.table.kinds import lost

# What is kept of a batch beside the source's own states, each with a block's number.
REPAIRED, INPUTS, OUTPUTS = "repaired", "inputs", "outputs"


@criterion(
    "repair", of="blocks", reads=("text",), removes=True, together="repair_each",
    check="run_starts", additive=True, default="repaired", order=10,
    says="perplexity of the model without a run of blocks, after the block before it was solved "
    "anew",
    work="ours",
)  # fmt: skip
def repair(
    stream: BlockStream,
    ids_NS: Tensor,
    *,
    protected: tuple[int, ...],
    remove: int | None = None,
    progress: Progress = silent,
) -> Scores:
    """Score runs of ``remove`` blocks, by default a fifth, by the perplexity left after repair.

    A block's value is the held-out perplexity without the best run that it belongs to (without
    the worst, if it belongs to none); ``removal_order`` is the best run.

    Raises:
        ShearlingError: too few sequences, no run possible beside the protected blocks, or an
            architecture whose blocks do not simply add to the stream.
    """
    removes = [_run_length(remove, stream.depth)]
    (scores,) = repair_each(stream, ids_NS, removes, protected=protected, progress=progress)
    return scores


@torch.inference_mode()
def repair_each(
    stream: BlockStream,
    ids_NS: Tensor,
    removes: Sequence[int],
    *,
    protected: tuple[int, ...],
    progress: Progress = silent,
) -> list[Scores]:
    """As :func:`repair`, for runs of several lengths in one walk."""
    gaps = [
        Gap(start, remove)
        for remove in dict.fromkeys(removes)
        for start in run_starts(stream.checkpoint, len(ids_NS), protected, remove)
    ]
    with stream.place.running(), States(stream.place) as states:
        trial = _Gaps(stream, ids_NS, gaps, states)
        for step in forward(trial.text, "scoring runs after repair", progress, runs=trial.runs):
            trial.step(step)
        losses = trial.losses()
    _require_finite(losses)
    return [
        _scores({gap.start: loss for gap, loss in losses.items() if gap.length == remove}, remove,
                stream.depth, protected)
        for remove in removes
    ]  # fmt: skip


def _scores(
    losses: dict[int, float], remove: int, depth: int, protected: tuple[int, ...]
) -> Scores:
    """Values of blocks from the losses without runs of ``remove``, by the run's first block."""
    best = min(losses, key=lambda start: losses[start])
    worst = max(losses.values())
    values = [
        exp_of(min((losses[s] for s in losses if s <= block < s + remove), default=worst))
        for block in range(depth)
    ]
    return Scores(
        "repair", "layers", (tuple(values),), protected,
        removal_order=tuple(range(best, best + remove)),
        details={"runs": {str(s): exp_of(loss) for s, loss in losses.items()}},
    )  # fmt: skip


def run_starts(
    checkpoint: Checkpoint, sequences: int, protected: Sequence[int], remove: int | None
) -> list[int]:
    """First blocks of the runs of ``remove`` that may go; nothing is read.

    Raises:
        ShearlingError: as :func:`repair`.
    """
    depth = checkpoint.shape["layers"]
    remove = _run_length(remove, depth)
    if not repairable(checkpoint):
        raise ShearlingError(
            f"criterion repair needs blocks that add to the residual stream with no norm behind, "
            f"which those of {checkpoint.family.model_type} are not; use --by perplexity."
        )
    if sequences < HELD_OUT:
        raise ShearlingError(
            f"{sequences} calibration sequences were given, but criterion repair holds every "
            f"fourth out; raise --samples to {HELD_OUT} or more."
        )
    starts = [
        start
        for start in range(1, depth - remove + 1)
        if not set(range(start, start + remove)) & set(protected)
        and lost(checkpoint.layout.kinds, range(start, start + remove)) is None
    ]
    if not starts:
        raise ShearlingError(
            f"no {remove} neighbouring blocks behind the first of {depth} are free to go"
            f"{' and leave one of each kind' if checkpoint.layout.kinds else ''}; "
            "remove fewer, protect fewer, or use --by perplexity."
        )
    return starts


def _run_length(remove: int | None, depth: int) -> int:
    return max(1, depth // 5) if remove is None else remove


def _require_finite(losses: dict[Gap, float]) -> None:
    broken = [gap for gap, loss in losses.items() if not math.isfinite(loss)]
    if broken:
        raise ShearlingError(
            f"repair gives no finite score for {len(broken)} of {len(losses)} runs, the first "
            f"starting at block {broken[0].start}; the weights hold NaN or infinity, or overflow: "
            "fetch the checkpoint again."
        )


class Gap(NamedTuple):
    """A run of blocks that is tried.

    Attributes:
        start: its first block.
        length: how many blocks it has.
    """

    start: int
    length: int

    @property
    def last(self) -> int:
        """Its last block."""
        return self.start + self.length - 1


class _Gaps:
    """The source's stream, the inputs kept until their gaps end, and the repaired streams."""

    def __init__(
        self, stream: BlockStream, ids_NS: Tensor, gaps: Sequence[Gap], states: States
    ) -> None:
        """Held-out sequences come in batches of their own: only they go on past a gap."""
        self.stream, self.gaps, self.states = stream, gaps, states
        # Before each start, the gap that ends last: until then its inputs are kept.
        self.longest = {gap.start: gap for gap in sorted(gaps, key=lambda gap: gap.length)}
        self.writer = branches(stream.checkpoint)[-1]
        self.ranks = stream.place.ranks.of(len(ids_NS))
        batches = held_apart(ids_NS, stream.batches, ranks=self.ranks)
        self.held = [is_held for _, is_held in batches]
        self.text = Text(stream, states).begin([ids_BS for ids_BS, _ in batches])
        self.open: set[Gap] = set()

    def runs(self, index: int) -> list[tuple[Key, int]]:
        """What a block runs: the source's states, and held-out ones of every gap behind us."""
        return [
            (key, number)
            for number, is_held in enumerate(self.held)
            for key in [*((REPAIRED, gap) for gap in sorted(self.open) if is_held), MAIN]
        ]

    def step(self, step: Step) -> None:
        """Run one block on every stream, then close the gaps that end with it."""
        with watching(step.block, [self.writer]) as seen:
            for run in step.passes:
                if run.key == MAIN and step.index + 1 in self.longest:
                    inputs_BSK = seen.inputs[self.writer.axis]
                    self.states.put((INPUTS, step.index), run.number, inputs_BSK)
                    self.states.put((OUTPUTS, step.index), run.number, run.after_BSD)
        for gap in self.gaps:
            if gap.last == step.index:
                writer = step.block.get_submodule(self.writer.writer)
                self._close(gap, writer.get_parameter("weight"))

    def _close(self, gap: Gap, like_DK: Tensor) -> None:
        """Solve for a gap, and let the model without it go on."""
        before = gap.start - 1
        fit, held = (self._moments(before, is_held, like_DK) for is_held in (False, True))
        if not (fit.finite() and held.finite()):
            raise ShearlingError(
                f"block {before} or one of the {gap.length} behind it gives states that are not "
                "finite numbers on the calibration text; fetch the checkpoint again."
            )
        # The choice of strength uses the held-out sequences, the solution does not.
        correction = correct(fit, held, bias=False, refit=False, ranks=self.ranks)
        fetch = self.states.take if gap == self.longest[gap.start] else self.states.get
        for number, is_held in enumerate(self.held):
            x_BSK = fetch((INPUTS, before), number)
            h_BSD = fetch((OUTPUTS, before), number)
            if is_held:
                repaired_BSD = h_BSD + x_BSK.to(h_BSD.dtype) @ correction.weight_KD.to(h_BSD.dtype)
                self.states.put((REPAIRED, gap), number, repaired_BSD)
        self.open.add(gap)

    def _moments(self, before: int, is_held: bool, like_DK: Tensor) -> Moments:
        moments = Moments(like_DK)
        for number in (n for n, other in enumerate(self.held) if other == is_held):
            wanted_TD = self.states.get(MAIN, number).flatten(0, 1)
            missing_TD = wanted_TD - self.states.get((OUTPUTS, before), number).flatten(0, 1)
            x_TK = self.states.get((INPUTS, before), number).flatten(0, 1).float()
            moments.add(x_TK, missing_TD, inverse_energy(wanted_TD))
        moments.add_up(self.ranks)
        return moments

    def losses(self) -> dict[Gap, float]:
        """Mean nats per token on the held-out sequences."""
        held = [n for n, is_held in enumerate(self.held) if is_held]
        predicted = [self.text.batches[n][:, 1:].numel() for n in held]
        last = ((self.states.get(MAIN, n), self.text.batches[n]) for n in held)
        needed = torch.cat([self.text.batches[n].flatten() for n in held]) if held else None
        words = self.stream.likely_words(last, needed, self.ranks)
        with self.stream.abridged(words):
            sums = [self._nats((REPAIRED, gap), held) for gap in self.gaps]
        *sums, tokens = self.ranks.totals([*sums, float(sum(predicted))])
        return {gap: nats / tokens for gap, nats in zip(self.gaps, sums, strict=True)}

    def _nats(self, key: Key, numbers: list[int]) -> float:
        """Over the held-out tokens of this rank."""
        nll = [
            self.stream.nll(self.states.get(key, n), self.text.batches[n]).flatten()
            for n in numbers
        ]
        return float(torch.cat(nll).sum(dtype=torch.float64)) if nll else 0.0
