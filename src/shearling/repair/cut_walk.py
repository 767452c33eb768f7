"""A cut's stream on its way beside the source's: block by block, its writers are solved anew.

Shapes: B sequences of a batch, S positions; D hidden of the source, E of the cut, K columns of a
writer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from shearling.engine.branches import Branch, Entrance, Seen, gain_behind, watching
from shearling.engine.experts import listening
from shearling.engine.moments import held_rows, inverse_energy
from shearling.engine.stream import BlockStream
from shearling.engine.views.cut import cut_view
from shearling.engine.walk import Step, Text, forward
from shearling.errors import ShearlingError
from shearling.files.progress import Progress
from shearling.model.checkpoint import Checkpoint
from shearling.repair.behind_norm import at_size_of, before_norm
from shearling.repair.by_source import Apart, damage_by_source
from shearling.repair.experts import ExpertOptions, ExpertRepair, Lack
from shearling.repair.final_norm import FittedGain, Triple, enough, fit_gain, gain_name, some_rows
from shearling.repair.mixture import MixtureBlock
from shearling.repair.result import Repair, Solved, SourceDamage
from shearling.repair.solve import SolvedFiles, WriterLack, apply_correction, fit_writer
from shearling.repair.source_walk import SourceWalk, not_finite
from shearling.table.axes import EXPERT_MLP, EXPERTS
from shearling.table.values import Cut, Keep

CUT = "cut"  # begins the keys of the cuts' streams among the states


@dataclass(frozen=True, slots=True)
class CutToRepair:
    """A cut, and how it is repaired.

    Attributes:
        keep: what survives; a cut vocabulary changes nothing here.
        directory: where the tensors are put, one file a block.
        cuttable: the model that is cut, if that is not the source: of the same blocks, but with
            another head (:mod:`shearling.repair.rotate`).
        final_norm: whether the final norm's gain is fitted as well
            (:mod:`shearling.repair.final_norm`).
        experts: how those of a mixture are repaired.
    """

    keep: Keep | Cut
    directory: Path
    cuttable: Checkpoint | None = None
    final_norm: bool = True
    experts: ExpertOptions = field(default_factory=ExpertOptions)


class CutWalk:
    """One cut's stream, and what of the cut was solved.

    Attributes:
        layers: its blocks, in the source's numbering.
        pending: the block of these that is to be solved next, once the source has passed it; None
            where the source has not.
        solved: one a writer.
    """

    def __init__(self, source: SourceWalk, wanted: CutToRepair, number: int) -> None:
        """Look up which channels of the source's stream there still are; ``number`` is its own."""
        self.source, self.states, self.wanted = source, source.states, wanted
        checkpoint = source.stream.checkpoint
        cuttable = wanted.cuttable or checkpoint
        expanded = cuttable.layout.cut(wanted.keep, cuttable.shape)
        keep = expanded.keep
        if "vocab" in keep.model:
            without = {axis: kept for axis, kept in keep.model.items() if axis != "vocab"}
            expanded = cuttable.layout.cut(Keep(without, keep.blocks), cuttable.shape)
        view = cut_view(cuttable, expanded)
        # The cut's blocks are solved anew one after the other, so none is kept.
        place = replace(source.stream.place, weights="disk")
        same = checkpoint is cuttable and view.shape["hidden"] == cuttable.shape["hidden"]
        cut = source.stream.beside(view, place) if same else BlockStream(view, place)
        self.cut = Text(cut, self.states, (CUT, number))
        self.view = view
        kept = keep.model.get("hidden")
        self.alive = None if kept is None else torch.tensor(kept, device=place.device)
        self.expanded, self.layers = expanded, expanded.layers
        self.whole = self._with_all_experts(cuttable)  # where some are merged
        self.pending: int | None = None
        self.solved: list[Solved] = []
        self.scale = 1.0
        self.gain: FittedGain | None = None
        self.damages: tuple[SourceDamage, ...] = ()
        self.files = SolvedFiles(wanted.directory, writes=source.stream.place.ranks.first)
        self.seconds = 0.0
        self._enterable = True  # until a block is found that is not
        self._singular: dict[int, int] = {}
        self._strengths: dict[str, float] = {}

    def _with_all_experts(self, cuttable: Checkpoint) -> BlockStream | None:
        """With merging, experts that go are read as well."""
        blocks = self.expanded.keep.blocks
        if not self.wanted.experts.merge or EXPERTS not in blocks:
            return None
        if EXPERT_MLP in blocks:
            raise ShearlingError(
                f"experts of {cuttable.name} were to be merged while {EXPERT_MLP} shrinks, but "
                "only whole experts can be averaged; leave one of the two out."
            )
        all_experts = Keep(
            self.expanded.keep.model, {a: kept for a, kept in blocks.items() if a != EXPERTS}
        )
        return BlockStream(cut_view(cuttable, all_experts), self.cut.stream.place)

    def begin(self) -> None:
        """Embed the source's tokens."""
        with self._timed():
            self.cut.begin(self.source.batches)
            # Gemma scales embeddings by the hidden size; everywhere else this is 1.
            kept = self._surviving(self.source.last(0))
            both = torch.stack([(self.states.get(self.cut.key, 0) * kept).sum(),
                                kept.square().sum()])  # fmt: skip
            self.source.ranks.add(both)
            self.scale = float(both[0] / both[1])

    def adjoins(self, index: int) -> bool:
        """Whether a block stays, and so does the one behind it, if there is one."""
        return index in self.layers and self._reaches(index)

    def follow(self) -> bool:
        """Solve the pending block, if the source now stands where the next one that stays does.

        Returns:
            Whether a block was solved.
        """
        index = self.source.reached - 1
        if index in self.layers:
            self.pending = index
        if self.pending is None or not self._reaches(index):
            return False
        with self._timed():
            self._repair(self.layers.index(self.pending), self.pending)
        self.pending = None
        return True

    def _reaches(self, index: int) -> bool:
        return index + 1 == self.source.stream.depth or index + 1 in self.layers

    def _repair(self, target: int, index: int) -> None:
        """Bring one surviving block's writers in line; the cut's stream moves on past it."""
        halves = self.source.halves(index)
        for step in forward(self.cut, blocks=range(target, target + 1)):
            for half in halves:
                solve = self._solve_experts if half.axis == EXPERTS else self._solve
                self.solved.append(solve(step, half, index))
            self._pass(step, halves)

    def _pass(self, step: Step, halves: Sequence[Branch]) -> None:
        """Move the cut's stream on past its repaired block."""
        last = halves[-1]
        if not self.source.additive or last.axis == EXPERTS:
            step.finish()
            return
        # All but the last product was computed while that was solved.
        for key, number in self.cut.runs():
            x_BSK = self.states.take((last.axis, "x"), number)
            y_BSE = _linear(step.block.get_submodule(last.writer), x_BSK)
            if last.norm is not None:
                y_BSE = step.block.get_submodule(last.norm)(y_BSE)
            y_BSE = last.scaled(y_BSE)
            self.states.put(key, number, self.states.take((last.axis, "before"), number) + y_BSE)

    def _solve(self, step: Step, half: Branch, index: int) -> Solved:
        """Solve one writer of the block that stands for ``index``."""
        writer = step.block.get_submodule(half.writer)
        assert isinstance(writer, nn.Linear)
        gain = gain_behind(step.block, half)
        start = self._strengths.get(half.axis, 1.0)
        fitted = fit_writer(
            writer, None if gain is None else gain.square(), self._missing(step, half, index),
            start=start, ranks=self.source.ranks,
        )  # fmt: skip
        if fitted is None:
            raise not_finite(index)
        if fitted.tokens < writer.in_features:
            self._singular[writer.in_features] = fitted.tokens
        if not fitted.lacking:
            return Solved(index, half.axis, None, fitted.before, fitted.before)
        strength = fitted.correction.strength
        if fitted.changes:
            self._strengths[half.axis] = strength or start
            path = f"{self.view.family.blocks}.{step.index}.{half.writer}"
            stored = self.cut.stream.stored
            sums = apply_correction(writer, fitted.correction, path, stored)
            self.files.save(sums, f"{step.index}.{half.axis}")
        return Solved(index, half.axis, strength, fitted.before, fitted.after)

    def _solve_experts(self, step: Step, half: Branch, index: int) -> Solved:
        """Solve the last matrices of a block's experts, each on the tokens that reach it."""
        mixture = self.view.family.mixture
        assert mixture is not None
        gain = gain_behind(step.block, half)
        mending = MixtureBlock(self.cut.stream, step.index, step.block, mixture)
        lacks = list(self._lacks(step, half, index, gain))
        if self._merge(mending, lacks):
            lacks = list(self._lacks(step, half, index, gain))
        start = self._strengths.get(EXPERTS, 1.0)
        repair = ExpertRepair(
            mending.experts, self.states, self.source.ranks, start,
            None if gain is None else gain.square(),
        )  # fmt: skip
        for lack in lacks:
            repair.add(lack)
        mended = repair.solve(router=self.wanted.experts.router)
        if not math.isfinite(mended.error_before):
            raise not_finite(index)
        if mended.corrections:
            self._strengths[EXPERTS] = mended.strength or start
        mending.change(mended)
        if mending.sums:
            self.files.save(mending.sums, f"{step.index}.{EXPERTS}")
        return Solved(index, EXPERTS, mended.strength, mended.error_before, mended.error_after)

    def _merge(self, mending: MixtureBlock, lacks: list[Lack]) -> bool:
        """Fold experts that go into those that stay, if that is asked for."""
        if self.whole is None:
            return False
        target = mending.target
        kept = self.expanded.keep.blocks[EXPERTS][target]
        with self.whole.block(target) as block:
            whole = MixtureBlock(self.whole, target, block, mending.mixture)
            mending.merge(whole, kept, [lack.routing for lack in lacks], self.source.ranks)
        return True

    def _lacks(self, step: Step, half: Branch, index: int, gain: Tensor | None) -> Iterator[Lack]:
        """What the block's experts lack, batch by batch."""
        mixture = self.view.family.mixture
        assert mixture is not None
        additive = self.source.additive
        assert additive == (gain is None), "experts behind a norm give what they gave"
        behind = [] if additive else [half]
        with listening(step.block, mixture) as routing, watching(step.block, behind) as seen:
            for number, calls in enumerate(self.cut.calls):
                h_BSE = self.states.get(self.cut.key, number)
                after_BSE = self.cut.stream.run(step.block, calls[step.index], h_BSE)
                held = self.source.held[number]
                if gain is not None:
                    own_BSE = self._surviving(self.source.own(index, half, number))
                    now_BSE = seen.outputs[half.axis].float()
                    own_BSE = at_size_of(own_BSE, now_BSE, gain)
                    missing_BSE = own_BSE - now_BSE
                    weight_T = inverse_energy(own_BSE).flatten()
                    yield Lack(routing(), missing_BSE.flatten(0, 1), weight_T, held)
                    continue
                wanted_BSE = self._kept(self.source.behind(index, half, number))
                # What is missing from the experts' sum, whose errors are the stream's all the same.
                missing_BSE = (wanted_BSE - after_BSE) / half.scale
                weight_T = inverse_energy(wanted_BSE).flatten() * half.scale**2
                yield Lack(routing(), missing_BSE.flatten(0, 1), weight_T, held)

    def _missing(self, step: Step, half: Branch, index: int) -> Iterator[WriterLack]:
        """What the outputs of a writer lack, batch by batch."""
        writer = step.block.get_submodule(half.writer)
        gain, halves = gain_behind(step.block, half), self.source.halves(index)
        additive = self.source.additive
        entrance = Entrance(step.block, halves[0]) if self._enters(halves, half) else None
        with watching(step.block, halves, until=half) as seen:
            for number in range(len(self.cut.calls)):
                h_BSE = self.states.get(self.cut.key, number)
                self._reach(step, half, number, seen, entrance)
                x_BSK = seen.inputs[half.axis]
                if half is halves[0] and self._enters(halves, halves[-1]):
                    self.states.put((half.axis, "x"), number, x_BSK)
                own_BSE = None
                if half.norm is not None or not additive:
                    own_BSE = self._surviving(self.source.own(index, half, number))
                if additive:
                    wanted_BSE = self._kept(self.source.behind(index, half, number))
                    w_BS = inverse_energy(wanted_BSE)
                    for before in halves[: halves.index(half)]:
                        h_BSE = h_BSE + seen.contributions[before.axis]
                    y_BSE = wanted_BSE - h_BSE
                    if half.scale != 1.0:  # the errors are the stream's all the same
                        y_BSE, w_BS = y_BSE / half.scale, w_BS * half.scale**2
                    if half is halves[-1]:
                        self.states.put((half.axis, "x"), number, x_BSK)
                        self.states.put((half.axis, "before"), number, h_BSE)
                else:
                    assert own_BSE is not None
                    if gain is not None:
                        own_BSE = at_size_of(own_BSE, _linear(writer, x_BSK).float(), gain)
                    y_BSE, w_BS = own_BSE, inverse_energy(own_BSE)
                if gain is not None and additive:
                    assert own_BSE is not None
                    y_BSE, w_BS = before_norm(y_BSE, own_BSE, w_BS, gain)
                held = self.source.held[number]
                yield WriterLack(held, x_BSK, y_BSE - _linear(writer, x_BSK), w_BS)

    def _enters(self, halves: Sequence[Branch], half: Branch) -> bool:
        """Whether the second branch is reached without running the first one again.

        Its inputs are as they were when the first one's writer was solved. Keeping them on disk
        would gain nothing.
        """
        alike = half is halves[-1] is not halves[0] and half.axis != EXPERTS
        return alike and self._enterable and self.states.place.states != "disk"

    def _reach(
        self, step: Step, half: Branch, number: int, seen: Seen, entrance: Entrance | None
    ) -> None:
        """Run a batch through a block that is watched, up to a writer."""
        stream, call = self.cut.stream, self.cut.calls[number][step.index]
        h_BSE, block = self.states.get(self.cut.key, number), step.block
        if entrance is None:
            stream.run_until(block, call, h_BSE)
            return
        first = self.source.halves(self.layers[step.index])[0]
        x_BSK = self.states.take((first.axis, "x"), number)
        if entrance.open and self._enterable:
            stream.run_from(block, call, h_BSE, entrance, x_BSK)
            return
        with entrance.noting():
            stream.run_until(block, call, h_BSE)
        if not self._enterable:
            return
        # The first batch is run both ways; unless that is the same, bit for bit, all are run whole.
        whole = seen.inputs[half.axis], seen.contributions[first.axis]
        if entrance.open:
            stream.run_from(block, call, h_BSE, entrance, x_BSK)
        again = seen.inputs[half.axis], seen.contributions[first.axis]
        same = all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))
        if not (entrance.open and same):
            self._enterable = False
            stream.run_until(block, call, h_BSE)

    def finish(self, progress: Progress, apart: Apart | None = None) -> None:
        """Fit the final norm's gain, where it is asked for, and wait until all is written.

        With several sources, ``apart``, what is lost on each is measured.
        """
        with self._timed():
            if self.wanted.final_norm:
                self.gain = self._fit_readout(progress)
            if apart is not None:
                self.damages = damage_by_source(self.source, self.cut, apart, self.gain)
            self.files.finish()

    def _fit_readout(self, progress: Progress) -> FittedGain | None:
        """Fit the final norm's gain, unless it is better left alone."""
        fit, held = (self._some(is_held) for is_held in (False, True))
        cut = self.cut.stream
        fitted = fit_gain(
            self.source.stream, cut, fit, held, ranks=self.source.ranks, progress=progress
        )
        if fitted is not None:
            name = gain_name(cut)
            assert name is not None
            self.files.save({name: fitted.gain_D.contiguous()}, "readout")
        return fitted

    def _some(self, is_held: bool) -> list[Triple]:
        """This rank's tokens and both streams' states of some sequences, to fit or judge by."""
        source = self.source
        length = source.batches[0].shape[1]
        rows = source.stream.rows(length)
        count = int((held_rows(source.sequences, source.windows) == is_held).sum())
        wanted = enough(source.stream.checkpoint.shape["vocab"])
        mine_N = source.ranks.share(some_rows(count, rows, length, wanted), backward=is_held)
        numbers = [n for n, other in enumerate(source.held) if other == is_held]
        triples: list[Triple] = []
        for n, wanted_B in zip(numbers, mine_N.split(rows), strict=False):
            at = wanted_B.nonzero().flatten()
            states = source.batches[n], source.last(n), self.states.get(self.cut.key, n)
            if len(at) == len(wanted_B):
                triples.append(states)
            elif len(at):
                ids_BS, h_BSD, c_BSE = states
                on_device = at.to(h_BSD.device)
                triples.append((ids_BS[at], h_BSD[on_device], c_BSE[on_device]))
        return triples

    def result(self, ids_NS: Tensor) -> Repair:
        """What was solved on tokens (N, S), and how well it did."""
        gain = self.gain
        return Repair(
            self.files.replaced(), tuple(self.solved), self._warnings(ids_NS.shape[1]),
            self.seconds + self.source.seconds, ids_NS.numel(),
            divergence=None if gain is None else (gain.before, gain.after),
            divergence_words=None if gain is None else gain.words,
            final_norm=self.wanted.final_norm, sources=self.damages,
        )  # fmt: skip

    def _warnings(self, length: int) -> tuple[str, ...]:
        """What a user should know of the tokens given, in sequences of ``length``."""
        return tuple(
            f"{tokens} calibration tokens do not determine matrices of {columns} columns, so that "
            f"the repair is weak; {4 * columns} tokens or more would do "
            f"(--samples {math.ceil(4 * columns / length)} at this length)."
            for columns, tokens in self._singular.items()
        )

    def _kept(self, h_BSD: Tensor) -> Tensor:
        h_BSE = self._surviving(h_BSD)
        return h_BSE if self.scale == 1.0 else h_BSE * self.scale

    def _surviving(self, h_BSD: Tensor) -> Tensor:
        h_BSD = h_BSD.float()
        return h_BSD if self.alive is None else h_BSD[..., self.alive]

    @contextmanager
    def _timed(self) -> Generator[None]:
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started


def _linear(writer: nn.Module, x_BSK: Tensor) -> Tensor:
    """The writer's own product, without the hooks that watch it."""
    assert isinstance(writer, nn.Linear)
    return nn.functional.linear(x_BSK, writer.weight, writer.bias)
