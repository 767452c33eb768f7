"""The source's stream beside a repair: what the blocks of its cuts are to bring their streams to.

The source is walked once, whatever number of cuts is repaired beside it. What it says of a block
is kept until the last cut that needs it has been solved there.

Shapes: B sequences of a batch, S positions; D hidden of the source.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Generator
from contextlib import contextmanager

from torch import Tensor

from shearling.engine.branches import Branch, branches, watching
from shearling.engine.moments import held_apart
from shearling.engine.ranks import ALONE
from shearling.engine.states import States
from shearling.engine.stream import BlockStream
from shearling.engine.walk import Text, forward
from shearling.errors import ShearlingError

SOURCE = "source"  # key of its stream among the states
OWN, STREAM = "own", "stream"  # what a branch gives, and the stream behind it


class SourceWalk:
    """The source's states, and what they say of the blocks that its cuts keep.

    Attributes:
        stream: the source.
        states: where its states and those of its cuts wait.
        additive: whether its blocks add to the stream.
        batches: this rank's tokens (B, S).
        held: of each batch, whether it is held out.
        ranks: who share the sequences.
        reached: blocks that the states have passed.
        seconds: what the walk has taken.
    """

    def __init__(self, stream: BlockStream, states: States) -> None:
        """Nothing is run yet."""
        self.stream, self.states = stream, states
        self.additive = stream.checkpoint.family.additive(stream.checkpoint.config)
        self.held: list[bool] = []
        self.sequences, self.windows = 0, 0
        self.ranks = ALONE
        self.reached = 0
        self.seconds = 0.0
        self._halves: dict[int, tuple[Branch, ...]] = {}
        self._text = Text(stream, states, SOURCE)
        self._kept: dict[int, set[tuple[str, str]]] = {}  # block -> branches and what of them

    @property
    def batches(self) -> list[Tensor]:
        """This rank's tokens (B, S)."""
        return self._text.batches

    @property
    def text(self) -> Text:
        """Its tokens, and where its states wait."""
        return self._text

    def begin(self, ids_NS: Tensor, windows: int) -> None:
        """Embed this rank's tokens; sequences are held out in a fixed pattern."""
        self.ranks = self.stream.place.ranks.of(len(ids_NS))
        self.sequences, self.windows = len(ids_NS), windows
        batches = held_apart(ids_NS, self.stream.batches, windows, self.ranks)
        self.held = [is_held for _, is_held in batches]
        self._text.begin([ids_BS for ids_BS, _ in batches])

    def halves(self, index: int) -> tuple[Branch, ...]:
        """The branches of a block."""
        if index not in self._halves:
            self._halves[index] = branches(self.stream.checkpoint, index)
        return self._halves[index]

    def step(self, index: int, *, kept: bool, adjoined: bool) -> None:
        """Run the next block.

        Args:
            index: its number.
            kept: whether a cut keeps it, so that what its branches do is wanted.
            adjoined: whether a cut keeps the block behind it as well, or there is none: the stream
                behind its last branch is then wanted as the branch leaves it.
        """
        assert index == self.reached
        with self._timed():
            for step in forward(self._text, blocks=range(index, index + 1)):
                if not kept:
                    for run in step.passes:
                        require_finite(run.after_BSD, index)
                    continue
                halves = self.halves(index)
                with watching(step.block, halves) as seen:
                    for run in step.passes:
                        require_finite(run.after_BSD, index)
                        h_BSD = run.before_BSD
                        for half in halves:
                            h_BSD = h_BSD + seen.contributions[half.axis]
                            if half.norm is not None or not self.additive:
                                # Only what is added to the stream is of the stream's scale.
                                self._keep(index, half, OWN, run.number, seen.outputs[half.axis])
                            if self.additive and (half is not halves[-1] or adjoined):
                                self._keep(index, half, STREAM, run.number, h_BSD)
            self.reached = index + 1

    def own(self, index: int, half: Branch, number: int) -> Tensor:
        """What a branch's writer gave on a batch (B, S, D)."""
        return self.states.get((index, half.axis, OWN), number)

    def behind(self, index: int, half: Branch, number: int) -> Tensor:
        """The stream (B, S, D) that a cut is to have behind a branch of block ``index``.

        The last branch stands for removed blocks behind it as well: of those, all that the source
        has passed since.
        """
        if self.reached > index + 1 and half.axis == self.halves(index)[-1].axis:
            return self.last(number)
        return self.states.get((index, half.axis, STREAM), number)

    def last(self, number: int) -> Tensor:
        """The state (B, S, D) behind the blocks that were passed."""
        return self.states.get(SOURCE, number)

    def forget(self, pending: Collection[int]) -> None:
        """Let go of what was kept of blocks, but for those that cuts have still to be solved at."""
        for index, kept in self._kept.items():
            last = self.halves(index)[-1].axis
            # What is pending waits for removed blocks, behind which the stream has moved on.
            gone = {one for one in kept if index not in pending or one == (last, STREAM)}
            for axis, what in gone:
                for number in range(len(self.batches)):
                    self.states.drop((index, axis, what), number)
            kept -= gone
        self._kept = {index: kept for index, kept in self._kept.items() if kept}

    def _keep(self, index: int, half: Branch, what: str, number: int, h_BSD: Tensor) -> None:
        self._kept.setdefault(index, set()).add((half.axis, what))
        self.states.put((index, half.axis, what), number, h_BSD)

    @contextmanager
    def _timed(self) -> Generator[None]:
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started


def require_finite(h_BSD: Tensor, index: int) -> None:
    """Raise ShearlingError unless the state behind block ``index`` is finite."""
    if not bool(h_BSD.isfinite().all()):
        raise not_finite(index)


def not_finite(index: int) -> ShearlingError:
    """What is said of a block whose states are not finite."""
    return ShearlingError(
        f"block {index} gives states that are not finite numbers on the calibration text; "
        "its weights hold NaN or infinity, or overflow: fetch the checkpoint again."
    )
