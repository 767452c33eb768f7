"""Closed-form repair after a cut: the matrices that write into the stream are solved anew.

The surviving blocks are walked in order. Each one's writers (o_proj, then down_proj) receive the
correction that brings the stream behind them nearest to the source model's stream at the place
where the block now stands, removed blocks behind it included, given the states that the repaired
blocks before it produce. Nothing is trained; shapes and configuration stay.

Shapes: N sequences of S positions, in batches of B; D hidden of the source, E of the cut, T
tokens of a batch, K columns of a writer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shearling.engine.branches import Branch, branches, watching
from shearling.engine.experts import listening
from shearling.engine.moments import (
    HELD_OUT,
    Correction,
    Moments,
    correct,
    held_apart,
    held_rows,
    inverse_energy,
)
from shearling.engine.ranks import ALONE
from shearling.engine.states import States
from shearling.engine.stream import BlockStream
from shearling.engine.views.cut import cut_view
from shearling.engine.walk import Step, Text, forward
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.model.checkpoint import Checkpoint
from shearling.repair.behind_norm import before_norm, gain_behind
from shearling.repair.experts import ExpertOptions, ExpertRepair, Lack
from shearling.repair.final_norm import FittedGain, Triple, enough, fit_gain, gain_name, some_rows
from shearling.repair.mixture import MixtureBlock
from shearling.repair.result import Repair, Solved
from shearling.table.axes import EXPERT_MLP, EXPERTS
from shearling.table.families.base import ExpertModules
from shearling.table.values import Cut, Keep

ROUNDING = 1e-9  # share of a stream's squared norm; less is no fault of the cut
SOURCE, CUT = "source", "cut"  # keys of the two streams among the states
# What else is kept of a token: for each branch what it is to bring the stream to, and what its
# writer gave; for the last one also the writer's input and the stream before what it gives.
KEPT_WIDTHS = 7  # in widths of the stream, the two streams included; beside the widest input


@torch.inference_mode()
def refit(
    source: BlockStream,
    keep: Keep | Cut,
    ids_NS: Tensor,
    directory: Path,
    *,
    cuttable: Checkpoint | None = None,
    windows: int | None = None,
    final_norm: bool = True,
    experts: ExpertOptions | None = None,
    progress: Progress = silent,
) -> Repair:
    """Solve the writers of a cut anew, on tokens.

    Memory is that of one block of the source and one of the cut, beside the states of the
    tokens, which wait where the source's place says.

    Args:
        source: the model to come near to.
        keep: what survives; a cut vocabulary changes nothing here.
        ids_NS: calibration tokens, in the source's numbering; at least 4 sequences.
        directory: where the tensors are put, one file a block.
        cuttable: the model that is cut, if that is not ``source``: of the same blocks, but with
            another head (:mod:`shearling.repair.rotate`).
        windows: how many of the sequences are texts of their own, if those behind them are copies
            of them in the same order (:func:`shearling.repair.rewritten.augment`); all, if not
            given.
        final_norm: whether the final norm's gain is fitted as well
            (:mod:`shearling.repair.final_norm`).
        experts: how those of a mixture are repaired.
        progress: told the blocks done.

    Raises:
        ShearlingError: too few sequences to hold any out, a state that is not finite (the block
            is named), or a ``keep`` that is not possible.
    """
    started = time.perf_counter()
    windows = len(ids_NS) if windows is None else windows
    require_enough(windows)
    with source.place.running(), States(source.place) as states:
        both = _SideBySide(source, cuttable or source.checkpoint, keep, states, directory)
        both.mend_experts(experts or ExpertOptions(), cuttable or source.checkpoint)
        both.begin(ids_NS, windows)
        solved = []
        layers = both.layers
        for target, block in enumerate(layers):
            solved += both.repair(target, block)
            progress("repairing the cut", target + 1, len(layers))
        gain = both.fit_readout(progress) if final_norm else None
        both.finish()
    return Repair(
        both.replaced(), tuple(solved), both.warnings(ids_NS.shape[1]),
        time.perf_counter() - started, ids_NS.numel(),
        divergence=None if gain is None else (gain.before, gain.after),
        divergence_words=None if gain is None else gain.words, final_norm=final_norm,
    )  # fmt: skip


def require_enough(windows: int) -> None:
    """Raise ShearlingError where there are too few sequences to hold any out."""
    if windows < HELD_OUT:
        raise ShearlingError(
            f"{windows} calibration sequences were given, but a repair needs at least "
            f"{HELD_OUT} to choose how strong it should be; raise --samples, or use --no-refit."
        )


class _SideBySide:
    """The two streams, and the block that stands between what was and what is."""

    def __init__(
        self,
        source: BlockStream,
        cuttable: Checkpoint,
        keep: Keep | Cut,
        states: States,
        directory: Path,
    ) -> None:
        """Look the branches up, and which channels of the source's stream there still are."""
        expanded = cuttable.layout.cut(keep, cuttable.shape)
        keep = expanded.keep
        if "vocab" in keep.model:
            without = {axis: kept for axis, kept in keep.model.items() if axis != "vocab"}
            expanded = cuttable.layout.cut(Keep(without, keep.blocks), cuttable.shape)
        view = cut_view(cuttable, expanded)
        # The cut's blocks are solved anew one after the other, so none is kept.
        place = replace(source.place, weights="disk")
        same = source.checkpoint is cuttable and view.shape["hidden"] == cuttable.shape["hidden"]
        cut = source.beside(view, place) if same else BlockStream(view, place)
        self.states, self.directory = states, directory
        self.source, self.cut = Text(source, states, SOURCE), Text(cut, states, CUT)
        self.view, self.halves = view, branches(source.checkpoint)  # of the block at hand
        kept = keep.model.get("hidden")
        self.alive = None if kept is None else torch.tensor(kept, device=place.device)
        self.additive = source.checkpoint.family.additive(source.checkpoint.config)
        self.expanded, self.layers = expanded, expanded.layers
        self.experts = ExpertOptions()
        self.whole: BlockStream | None = None  # all experts, where some are merged
        self.reached = 0  # blocks that the source's stream has passed
        self.scale = 1.0
        self.held: list[bool] = []
        self.sequences, self.windows = 0, 0
        self.ranks = ALONE
        self.files: dict[str, Path] = {}
        self.writer = ThreadPoolExecutor(1, "shearling-solved")  # while the next is solved
        self.writing: list[Future[None]] = []
        self.singular: dict[int, int] = {}
        self.strengths: dict[str, float] = {}

    def mend_experts(self, options: ExpertOptions, cuttable: Checkpoint) -> None:
        """Say how experts are repaired; with merging, those that go are read as well."""
        self.experts, blocks = options, self.expanded.keep.blocks
        if not options.merge or EXPERTS not in blocks:
            return
        if EXPERT_MLP in blocks:
            raise ShearlingError(
                f"experts of {cuttable.name} were to be merged while {EXPERT_MLP} shrinks, but "
                "only whole experts can be averaged; leave one of the two out."
            )
        all_experts = Keep(
            self.expanded.keep.model, {a: kept for a, kept in blocks.items() if a != EXPERTS}
        )
        self.whole = BlockStream(cut_view(cuttable, all_experts), self.cut.stream.place)

    def begin(self, ids_NS: Tensor, windows: int) -> None:
        """Embed this rank's tokens twice; sequences are held out in a fixed pattern."""
        self.ranks = self.source.stream.place.ranks.of(len(ids_NS))
        self.sequences, self.windows = len(ids_NS), windows
        batches = held_apart(ids_NS, self.source.stream.batches, windows, self.ranks)
        self.held = [is_held for _, is_held in batches]
        for text in (self.source, self.cut):
            text.begin([ids_BS for ids_BS, _ in batches])
        # Gemma scales embeddings by the hidden size; everywhere else this is 1.
        kept = self._surviving(self.states.get(SOURCE, 0))
        both = torch.stack([(self.states.get(CUT, 0) * kept).sum(), kept.square().sum()])
        self.ranks.add(both)
        self.scale = float(both[0] / both[1])

    def repair(self, target: int, index: int) -> list[Solved]:
        """Bring one surviving block's writers in line; both streams move on past it.

        The source's stream moves on to where the next surviving block stands.
        """
        self.halves = branches(self.source.stream.checkpoint, index)
        following = self.layers[target + 1] if target + 1 < len(self.layers) else None
        self._targets(index, self.source.stream.depth if following is None else following)
        solved = []
        for step in forward(self.cut, blocks=range(target, target + 1)):
            for half in self.halves:
                solve = self._solve_experts if half.axis == EXPERTS else self._solve
                solved.append(solve(step, half, index))
            self._pass(step)
        return solved

    def _pass(self, step: Step) -> None:
        """Move the cut's stream on past its repaired block."""
        if not self.additive or self.halves[-1].axis == EXPERTS:
            step.finish()
            return
        # All but the last product was computed while that was solved.
        last = self.halves[-1]
        for _, number in self.cut.runs():
            x_BSK = self.states.take((last.axis, "x"), number)
            y_BSE = _linear(step.block.get_submodule(last.writer), x_BSK)
            if last.norm is not None:
                y_BSE = step.block.get_submodule(last.norm)(y_BSE)
            y_BSE = last.scaled(y_BSE)
            self.states.put(CUT, number, self.states.take((last.axis, "before"), number) + y_BSE)

    def _advance(self, blocks: range) -> None:
        """Move the source's stream past some blocks."""
        for step in forward(self.source, blocks=blocks):
            for run in step.passes:
                _require_finite(run.after_BSD, step.index)
            self.reached = step.index + 1

    def _targets(self, index: int, following: int) -> None:
        """What each branch of block ``index`` is to bring the stream to, in the cut's channels."""
        self._advance(range(self.reached, index))  # removed before the first that survives
        for step in forward(self.source, blocks=range(index, index + 1)):
            with watching(step.block, self.halves) as seen:
                for run in step.passes:
                    _require_finite(run.after_BSD, index)
                    h_BSD = run.before_BSD
                    for half in self.halves:
                        h_BSD = h_BSD + seen.contributions[half.axis]
                        if half.norm is not None or not self.additive:
                            # Only what is added to the stream is of the stream's scale.
                            own_BSE = self._surviving(seen.outputs[half.axis])
                            self.states.put((half.axis, "own"), run.number, own_BSE)
                        if self.additive:
                            self.states.put((half.axis, "stream"), run.number, self._kept(h_BSD))
        self.reached = index + 1
        self._advance(range(self.reached, following))
        if self.additive and following > index + 1:  # the last branch stands for these as well
            for _, number in self.source.runs():
                h_BSD = self.states.get(SOURCE, number)
                self.states.put((self.halves[-1].axis, "stream"), number, self._kept(h_BSD))

    def _solve(self, step: Step, half: Branch, index: int) -> Solved:
        """Solve one writer of the block that stands for ``index``."""
        writer = step.block.get_submodule(half.writer)
        assert isinstance(writer, nn.Linear)
        gain = gain_behind(step.block, half)
        importance_E = None if gain is None else gain.square()
        fit, held = (Moments(writer.weight, importance_E) for _ in range(2))
        for number, x_BSK, missing_BSE, w_BS in self._missing(step, half):
            moments = held if self.held[number] else fit
            moments.add(x_BSK.flatten(0, 1).float(), missing_BSE.flatten(0, 1), w_BS.flatten())
        for moments in (fit, held):
            moments.add_up(self.ranks)
        if not (fit.finite() and held.finite()):
            raise _not_finite(index)
        if fit.tokens + held.tokens < writer.in_features:
            self.singular[writer.in_features] = fit.tokens + held.tokens
        start = self.strengths.get(half.axis, 1.0)
        bias = writer.bias is not None
        found = correct(fit, held, bias=bias, start=start, ranks=self.ranks)
        before, after = (e / held.tokens for e in (found.error_before, found.error_after))
        if found.error_before <= ROUNDING * held.tokens:
            return Solved(index, half.axis, None, before, before)
        changed = found.strength is not None and found.error_after < found.error_before
        if changed:
            self.strengths[half.axis] = found.strength or start
            sums = self._apply(writer, found, f"{step.index}.{half.writer}")
            self._save(sums, f"{step.index}.{half.axis}")
        return Solved(index, half.axis, found.strength, before, after)

    def _solve_experts(self, step: Step, half: Branch, index: int) -> Solved:
        """Solve the last matrices of a block's experts, each on the tokens that reach it."""
        mixture = self.view.family.mixture
        assert mixture is not None
        assert self.additive, "experts write into the stream, with no norm behind"
        mending = MixtureBlock(self.cut.stream, step.index, step.block, mixture)
        lacks = list(self._lacks(step, half, mixture))
        if self._merge(mending, lacks):
            lacks = list(self._lacks(step, half, mixture))
        start = self.strengths.get(EXPERTS, 1.0)
        repair = ExpertRepair(mending.experts, self.states, self.ranks, start)
        for lack in lacks:
            repair.add(lack)
        mended = repair.solve(router=self.experts.router)
        if not math.isfinite(mended.error_before):
            raise _not_finite(index)
        if mended.corrections:
            self.strengths[EXPERTS] = mended.strength or start
        mending.change(mended)
        if mending.sums:
            self._save(mending.sums, f"{step.index}.{EXPERTS}")
        return Solved(index, EXPERTS, mended.strength, mended.error_before, mended.error_after)

    def _merge(self, mending: MixtureBlock, lacks: list[Lack]) -> bool:
        """Fold experts that go into those that stay, if that is asked for."""
        if self.whole is None:
            return False
        target = mending.target
        kept = self.expanded.keep.blocks[EXPERTS][target]
        with self.whole.block(target) as block:
            whole = MixtureBlock(self.whole, target, block, mending.mixture)
            mending.merge(whole, kept, [lack.routing for lack in lacks], self.ranks)
        return True

    def _lacks(self, step: Step, half: Branch, mixture: ExpertModules) -> Iterator[Lack]:
        """What the block's experts lack, batch by batch."""
        with listening(step.block, mixture) as routing:
            for number, calls in enumerate(self.cut.calls):
                h_BSE = self.states.get(CUT, number)
                after_BSE = self.cut.stream.run(step.block, calls[step.index], h_BSE)
                wanted_BSE = self.states.get((half.axis, "stream"), number)
                # What is missing from the experts' sum, whose errors are the stream's all the same.
                missing_BSE = (wanted_BSE - after_BSE) / half.scale
                weight_T = inverse_energy(wanted_BSE).flatten() * half.scale**2
                yield Lack(routing(), missing_BSE.flatten(0, 1), weight_T, self.held[number])

    def _missing(self, step: Step, half: Branch) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Batch, writer's inputs, what its outputs lack, and the tokens' weights."""
        writer = step.block.get_submodule(half.writer)
        gain = gain_behind(step.block, half)
        with watching(step.block, self.halves, until=half) as seen:
            for number, calls in enumerate(self.cut.calls):
                h_BSE = self.states.get(CUT, number)
                self.cut.stream.run_until(step.block, calls[step.index], h_BSE)
                x_BSK = seen.inputs[half.axis]
                own_BSE = None
                if half.norm is not None or not self.additive:
                    own_BSE = self.states.get((half.axis, "own"), number)
                if self.additive:
                    wanted_BSE = self.states.get((half.axis, "stream"), number)
                    w_BS = inverse_energy(wanted_BSE)
                    for before in self.halves[: self.halves.index(half)]:
                        h_BSE = h_BSE + seen.contributions[before.axis]
                    y_BSE = wanted_BSE - h_BSE
                    if half.scale != 1.0:  # the errors are the stream's all the same
                        y_BSE, w_BS = y_BSE / half.scale, w_BS * half.scale**2
                    if half is self.halves[-1]:
                        self.states.put((half.axis, "x"), number, x_BSK)
                        self.states.put((half.axis, "before"), number, h_BSE)
                else:
                    assert own_BSE is not None
                    y_BSE, w_BS = own_BSE, inverse_energy(own_BSE)
                if gain is not None:
                    assert own_BSE is not None
                    y_BSE, w_BS = before_norm(y_BSE, own_BSE, w_BS, gain)
                yield number, x_BSK, y_BSE - _linear(writer, x_BSK), w_BS

    def _apply(self, writer: nn.Linear, found: Correction, path: str) -> dict[str, Tensor]:
        """Add a correction to a writer; gives the sums in the digits that are stored."""
        sums = {}
        for name, correction in (("weight", found.weight_KD.T), ("bias", found.bias_D)):
            parameter = getattr(writer, name)
            if parameter is None:
                continue
            full, stored = f"{self.view.family.blocks}.{path}.{name}", parameter
            if parameter.dtype != torch.float32:  # computed in fewer digits than there may be
                stored = self.cut.stream.stored(full).float()
            sums[full] = (stored + correction.to(stored.dtype)).contiguous()
            setattr(writer, name, nn.Parameter(sums[full].to(parameter.dtype), requires_grad=False))
        return sums

    def _save(self, tensors: Mapping[str, Tensor], name: str) -> None:
        if not self.ranks.first:
            return
        file = self.directory / f"{name}.safetensors"
        for earlier in self.writing[:-1]:  # one waits at most; and a full disk is told at once
            earlier.result()
        on_host = {name: tensor.cpu() for name, tensor in tensors.items()}
        self.writing.append(self.writer.submit(save_file, on_host, file))
        self.files |= dict.fromkeys(tensors, file)

    def finish(self) -> None:
        """Wait until everything is written, or raise what went wrong with it."""
        for writing in self.writing:
            writing.result()
        self.writer.shutdown()

    def fit_readout(self, progress: Progress) -> FittedGain | None:
        """Fit the final norm's gain, unless it is better left alone."""
        fit, held = (self._some(is_held) for is_held in (False, True))
        source, cut = self.source.stream, self.cut.stream
        fitted = fit_gain(source, cut, fit, held, ranks=self.ranks, progress=progress)
        if fitted is not None:
            name = gain_name(cut)
            assert name is not None
            self._save({name: fitted.gain_D.contiguous()}, "readout")
        return fitted

    def _some(self, is_held: bool) -> list[Triple]:
        """This rank's tokens and both streams' states of some sequences, to fit or judge by."""
        length = self.cut.batches[0].shape[1]
        rows = self.source.stream.rows(length)
        count = int((held_rows(self.sequences, self.windows) == is_held).sum())
        wanted = enough(self.source.stream.checkpoint.shape["vocab"])
        mine_N = self.ranks.share(some_rows(count, rows, length, wanted), backward=is_held)
        numbers = [n for n, other in enumerate(self.held) if other == is_held]
        triples: list[Triple] = []
        for n, wanted_B in zip(numbers, mine_N.split(rows), strict=False):
            at = wanted_B.nonzero().flatten()
            states = self.cut.batches[n], self.states.get(SOURCE, n), self.states.get(CUT, n)
            if len(at) == len(wanted_B):
                triples.append(states)
            elif len(at):
                ids_BS, h_BSD, c_BSE = states
                on_device = at.to(h_BSD.device)
                triples.append((ids_BS[at], h_BSD[on_device], c_BSE[on_device]))
        return triples

    def _kept(self, h_BSD: Tensor) -> Tensor:
        h_BSE = self._surviving(h_BSD)
        return h_BSE if self.scale == 1.0 else h_BSE * self.scale

    def _surviving(self, h_BSD: Tensor) -> Tensor:
        h_BSD = h_BSD.float()
        return h_BSD if self.alive is None else h_BSD[..., self.alive]

    def replaced(self) -> dict[str, Callable[[], Tensor]]:
        """What was solved, read from its file when it is asked for."""
        return {
            name: lambda name=name, file=file: load_file(file)[name]
            for name, file in self.files.items()
        }

    def warnings(self, length: int) -> tuple[str, ...]:
        """What a user should know of the tokens given, in sequences of ``length``."""
        return tuple(
            f"{tokens} calibration tokens do not determine matrices of {columns} columns, so that "
            f"the repair is weak; {4 * columns} tokens or more would do "
            f"(--samples {math.ceil(4 * columns / length)} at this length)."
            for columns, tokens in self.singular.items()
        )


def _require_finite(h_BSD: Tensor, index: int) -> None:
    if not bool(h_BSD.isfinite().all()):
        raise _not_finite(index)


def _not_finite(index: int) -> ShearlingError:
    return ShearlingError(
        f"block {index} gives states that are not finite numbers on the calibration text; "
        "its weights hold NaN or infinity, or overflow: fetch the checkpoint again."
    )


def _linear(writer: nn.Module, x_BSK: Tensor) -> Tensor:
    """The writer's own product, without the hooks that watch it."""
    assert isinstance(writer, nn.Linear)
    return nn.functional.linear(x_BSK, writer.weight, writer.bias)
