"""Loss after repair: which run of blocks can go, given that the block before it will stand in.

For each place where a run of blocks could be taken out, the down-projection before the gap is
solved anew (shearling.engine.moments) so that the stream after it is nearest to the stream after
the gap, and the perplexity of the model so repaired is measured on sequences held out from the
solution. Neighbours are removed together: the repair bridges one gap better than many
(LOG.md, 2026-11-22).
All places are tried in one walk: the source's stream and, past each gap, the held-out states of
the model without it, so that every block's weights are read once.

Shapes: N sequences of S positions, in batches of B; D hidden, K columns of the writer.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from shearling.engine.branches import branches, watching
from shearling.engine.moments import HELD_OUT, Moments, correct, held_apart
from shearling.engine.products import fast_products
from shearling.engine.states import States
from shearling.engine.stream import BlockStream
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.model.checkpoint import Checkpoint
from shearling.scoring.blocks.perplexity import exp_of
from shearling.scoring.scores import Scores

_MAIN = frozenset({-1})


def repairable(checkpoint: Checkpoint) -> bool:
    """Whether a block's last matrix adds to the stream as it is, with no norm behind it."""
    family = checkpoint.family
    return family.additive(checkpoint.config) and not family.post_norms


@torch.inference_mode()
@fast_products()
def repair(
    stream: BlockStream,
    ids_NS: Tensor,
    *,
    protected: tuple[int, ...],
    remove: int,
    progress: Progress = silent,
) -> Scores:
    """Score runs of ``remove`` blocks by the perplexity that is left after repair.

    A block's value is the held-out perplexity without the best run that it belongs to (without
    the worst, if it belongs to none); ``removal_order`` is the best run.

    Raises:
        ShearlingError: too few sequences, no run possible beside the protected blocks, or an
            architecture whose blocks do not simply add to the stream.
    """
    starts = run_starts(stream.checkpoint, len(ids_NS), protected, remove)
    with tempfile.TemporaryDirectory(prefix="shearling-") as scratch:
        walk = _Walk(stream, ids_NS, starts, remove, None if stream.resident else Path(scratch))
        for index in range(stream.depth):
            walk.step(index)
            progress("scoring runs after repair", index + 1, stream.depth)
        losses = walk.losses()
    _require_finite(losses)
    best = min(losses, key=lambda start: losses[start])
    worst = max(losses.values())
    values = [
        exp_of(min((losses[s] for s in losses if s <= block < s + remove), default=worst))
        for block in range(stream.depth)
    ]
    return Scores(
        "repair", "layers", tuple(values), protected,
        removal_order=tuple(range(best, best + remove)),
        details={"runs": {str(s): exp_of(loss) for s, loss in losses.items()}},
    )  # fmt: skip


def run_starts(
    checkpoint: Checkpoint, sequences: int, protected: Sequence[int], remove: int
) -> list[int]:
    """First blocks of the runs of ``remove`` that may go; nothing is read.

    Raises:
        ShearlingError: as :func:`repair`.
    """
    depth = checkpoint.shape["layers"]
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
    ]
    if not starts:
        raise ShearlingError(
            f"no {remove} neighbouring blocks behind the first of {depth} are free to go; "
            "remove fewer, protect fewer, or use --by perplexity."
        )
    return starts


def _require_finite(losses: dict[int, float]) -> None:
    broken = [start for start, loss in losses.items() if not math.isfinite(loss)]
    if broken:
        raise ShearlingError(
            f"repair gives no finite score for {len(broken)} of {len(losses)} runs, the first "
            f"starting at block {broken[0]}; the weights hold NaN or infinity, or overflow: fetch "
            "the checkpoint again."
        )


class _Walk:
    """The source's stream, the inputs kept until their gap ends, and the repaired streams."""

    def __init__(
        self, stream: BlockStream, ids_NS: Tensor, starts: list[int], remove: int,
        scratch: Path | None,
    ) -> None:  # fmt: skip
        self.stream, self.starts, self.remove = stream, starts, remove
        self.last = branches(stream.checkpoint)[-1]
        self.states = States(scratch)
        # Held-out sequences come in batches of their own: only they go on past a gap.
        self.batches = held_apart(ids_NS, stream.batches)
        self.calls = []
        for number, (ids_BS, _) in enumerate(self.batches):
            h_BSD, calls = stream.begin(ids_BS)
            self.states.put(_MAIN, number, h_BSD)
            self.calls.append(calls)
        self.open: set[int] = set()

    def step(self, index: int) -> None:
        """Run one block on every stream, then close the gap that ends with it."""
        with self.stream.block(index) as block, watching(block, [self.last]) as seen:
            for number, (_, held) in enumerate(self.batches):
                call = self.calls[number][index]
                for start in sorted(self.open) if held else ():
                    key = _repaired(start)
                    self.states.put(key, number, call(block, self.states.get(key, number)))
                out_BSD = call(block, self.states.get(_MAIN, number))
                self.states.put(_MAIN, number, out_BSD)
                if index + 1 in self.starts:
                    self.states.put(_inputs(index), number, seen.inputs[self.last.axis])
                    self.states.put(_outputs(index), number, out_BSD)
            start = index + 1 - self.remove
            if start in self.starts:
                self._close(start)

    def _close(self, start: int) -> None:
        """Solve for the gap that starts at ``start``, and let the model without it go on."""
        before = start - 1
        fit, held = self._moments(before, False), self._moments(before, True)
        if not (fit.finite() and held.finite()):
            raise ShearlingError(
                f"block {before} or one of the {self.remove} behind it gives states that are not "
                "finite numbers on the calibration text; fetch the checkpoint again."
            )
        # The choice of strength uses the held-out sequences, the solution does not.
        found = correct(fit, held, bias=False, refit=False)
        for number, (_, is_held) in enumerate(self.batches):
            x_BSK = self.states.get(_inputs(before), number)
            h_BSD = self.states.get(_outputs(before), number)
            self.states.drop(_inputs(before), number)
            self.states.drop(_outputs(before), number)
            if is_held:
                repaired = h_BSD + x_BSK @ found.weight_KD.to(x_BSK.dtype)
                self.states.put(_repaired(start), number, repaired)
        self.open.add(start)

    def _moments(self, before: int, held: bool) -> Moments:
        numbers = [n for n, (_, is_held) in enumerate(self.batches) if is_held == held]
        width = self.states.get(_inputs(before), numbers[0]).shape[-1]
        moments = Moments(width, self.stream.checkpoint.shape["hidden"])
        for number in numbers:
            wanted_TD = self.states.get(_MAIN, number).flatten(0, 1)
            missing_TD = wanted_TD - self.states.get(_outputs(before), number).flatten(0, 1)
            x_TK = self.states.get(_inputs(before), number).flatten(0, 1)
            moments.add(x_TK, missing_TD, 1 / wanted_TD.square().sum(-1).clamp_min(1e-12))
        return moments

    def losses(self) -> dict[int, float]:
        """Mean nats per token on the held-out sequences, by the run's first block."""
        held = [(n, ids_BS) for n, (ids_BS, is_held) in enumerate(self.batches) if is_held]
        return {
            start: float(
                torch.cat(
                    [
                        self.stream.nll(self.states.get(_repaired(start), n), ids_BS).flatten()
                        for n, ids_BS in held
                    ]
                ).mean(dtype=torch.float64)
            )
            for start in self.starts
        }


def _repaired(start: int) -> frozenset[int]:
    return frozenset({-2, start})


def _inputs(index: int) -> frozenset[int]:
    return frozenset({-3, index})


def _outputs(index: int) -> frozenset[int]:
    return frozenset({-4, index})
