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
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shearling.engine.branches import Branch, branches, run_until, watching
from shearling.engine.moments import HELD_OUT, Correction, Moments, correct, held_apart
from shearling.engine.products import fast_products
from shearling.engine.states import States
from shearling.engine.stream import BlockStream, Call
from shearling.engine.views.cut import CutView, cut_view
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.model.checkpoint import Checkpoint
from shearling.repair.final_norm import fit_gain, gain_name, some
from shearling.repair.result import Repair, Step
from shearling.table.axes import Keep

ROUNDING = 1e-9  # share of a stream's squared norm; less is no fault of the cut
_SOURCE, _CUT = frozenset({-1}), frozenset({-2})  # keys of the two streams among the states


@torch.inference_mode()
@fast_products()
def refit(
    checkpoint: Checkpoint,
    keep: Keep,
    ids_NS: Tensor,
    directory: Path,
    *,
    reference: Checkpoint | None = None,
    windows: int | None = None,
    stream: bool | None = None,
    progress: Progress = silent,
) -> Repair:
    """Solve the writers of a cut anew, on tokens.

    Memory is that of one block of the source and one of the cut, beside the states of the
    tokens, which lie on disk when the model is streamed.

    Args:
        checkpoint: the source.
        keep: what survives; a cut vocabulary changes nothing here.
        ids_NS: calibration tokens, in the source's numbering; at least 4 sequences.
        directory: where the tensors are put, one file a block.
        reference: the model to come near to, if that is not ``checkpoint``: of the same blocks,
            but with another head (:mod:`shearling.repair.rotate`).
        windows: how many of the sequences are texts of their own, if those behind them are copies
            of them in the same order (:func:`shearling.repair.rewritten.augment`); all, if not
            given.
        stream: read blocks from disk as they are needed (True), hold the model in memory (False),
            or go by the memory that is free (None).
        progress: told the blocks done.

    Raises:
        ShearlingError: too few sequences to hold any out, a state that is not finite (the block
            is named), or a ``keep`` that is not possible.
    """
    started = time.perf_counter()
    windows = len(ids_NS) if windows is None else windows
    if windows < HELD_OUT:
        raise ShearlingError(
            f"{windows} calibration sequences were given, but a repair needs at least "
            f"{HELD_OUT} to choose how strong it should be; raise --samples, or use --no-refit."
        )
    without_vocab = Keep({a: i for a, i in keep.model.items() if a != "vocab"}, keep.blocks)
    view = cut_view(checkpoint, without_vocab)
    resident = None if stream is None else not stream
    with tempfile.TemporaryDirectory(prefix="shearling-") as scratch:
        source = BlockStream(reference or checkpoint, resident=resident)
        states = States(None if source.resident else Path(scratch))
        same = reference is None and view.shape["hidden"] == checkpoint.shape["hidden"]
        cut = BlockStream(
            view, resident=False, like=source if same else None, thrifty=not source.resident
        )
        walk = _Walk(source, cut, view, keep, states, directory)
        walk.begin(ids_NS, windows)
        steps = []
        layers = keep.model.get("layers", tuple(range(source.depth)))
        for target, block in enumerate(layers):
            steps += walk.repair(target, block)
            progress("repairing the cut", target + 1, len(layers))
        readout = walk.fit_readout(progress)
        warnings = walk.warnings()  # asks the states how long sequences are
    return Repair(
        walk.replaced(), tuple(steps), warnings, time.perf_counter() - started,
        ids_NS.numel(), readout,
    )  # fmt: skip


@dataclass
class _Walk:
    """The two streams side by side, and the block that stands between what was and what is."""

    source: BlockStream
    cut: BlockStream
    view: CutView
    keep: Keep
    states: States
    directory: Path
    calls: list[tuple[list[Call], list[Call]]] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)
    scale: float = 1.0
    held: list[bool] = field(default_factory=list)
    batches: list[Tensor] = field(default_factory=list)
    singular: dict[int, int] = field(default_factory=dict)
    strengths: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Look the branches up, and which channels of the source's stream there still are."""
        kept = self.keep.model.get("hidden")
        self.alive = None if kept is None else torch.tensor(kept)
        self.halves = branches(self.source.checkpoint)
        self.additive = self.source.checkpoint.family.additive(self.source.checkpoint.config)
        self.reached = 0

    def begin(self, ids_NS: Tensor, windows: int) -> None:
        """Embed the tokens twice; sequences are held out in a fixed pattern."""
        batches = held_apart(ids_NS, self.source.batches, windows)
        for number, (ids_BS, held) in enumerate(batches):
            h_BSD, source_calls = self.source.begin(ids_BS)
            h_BSE, cut_calls = self.cut.begin(ids_BS)
            if number == 0:
                # Gemma scales embeddings by the hidden size; everywhere else this is 1.
                kept = self._kept(h_BSD)
                self.scale = float((h_BSE * kept).sum() / kept.square().sum())
            self.states.put(_SOURCE, number, h_BSD)
            self.states.put(_CUT, number, h_BSE)
            self.calls.append((source_calls, cut_calls))
            self.held.append(held)
            self.batches.append(ids_BS)

    def repair(self, target: int, index: int) -> list[Step]:
        """Bring one surviving block's writers in line; both streams move on past it.

        The source's stream moves on to where the next surviving block stands.
        """
        layers = self.keep.model.get("layers", tuple(range(self.source.depth)))
        following = layers[target + 1] if target + 1 < len(layers) else self.source.depth
        while self.reached < index:  # blocks removed before the first that survives
            self._advance(self.reached)
        self._targets(index, following)
        steps = []
        with self.cut.block(target) as block:
            for half in self.halves:
                step, changed = self._solve(block, half, target, index)
                steps.append(step)
                if changed:
                    self._save(block, half, target)
            self._pass(block, target)
        return steps

    def _pass(self, block: nn.Module, target: int) -> None:
        """Move the cut's stream on past its repaired block."""
        last = self.halves[-1]
        for number, (_, calls) in enumerate(self.calls):
            if self.additive:  # all but the last product was computed while that was solved
                y_BSE = _linear(
                    block.get_submodule(last.writer), self.states.get(_key(last, "x"), number)
                )
                if last.norm is not None:
                    y_BSE = block.get_submodule(last.norm)(y_BSE)
                h_BSE = self.states.get(_key(last, "before"), number) + y_BSE
            else:
                h_BSE = calls[target](block, self.states.get(_CUT, number))
            self.states.put(_CUT, number, h_BSE)

    def _advance(self, index: int) -> None:
        with self.source.block(index) as block:
            for number, (calls, _) in enumerate(self.calls):
                h_BSD = calls[index](block, self.states.get(_SOURCE, number))
                _require_finite(h_BSD, index)
                self.states.put(_SOURCE, number, h_BSD)
        self.reached = index + 1

    def _targets(self, index: int, following: int) -> None:
        """What each branch of block ``index`` is to bring the stream to, in the cut's channels."""
        with self.source.block(index) as block, watching(block, self.halves) as seen:
            for number, (calls, _) in enumerate(self.calls):
                h_BSD = self.states.get(_SOURCE, number)
                out_BSD = calls[index](block, h_BSD)
                _require_finite(out_BSD, index)
                self.states.put(_SOURCE, number, out_BSD)
                for half in self.halves:
                    h_BSD = h_BSD + seen.contributions[half.axis]
                    if half.norm is not None or not self.additive:
                        # Only what is added to the stream is of the stream's scale.
                        own_BSE = self._surviving(seen.outputs[half.axis])
                        self.states.put(_key(half, "own"), number, own_BSE)
                    if self.additive:
                        self.states.put(_key(half, "stream"), number, self._kept(h_BSD))
        self.reached = index + 1
        while self.reached < following:
            self._advance(self.reached)
        if self.additive and following > index + 1:  # the last branch stands for these as well
            for number in range(len(self.calls)):
                h_BSD = self.states.get(_SOURCE, number)
                self.states.put(_key(self.halves[-1], "stream"), number, self._kept(h_BSD))

    def _solve(self, block: nn.Module, half: Branch, target: int, index: int) -> tuple[Step, bool]:
        writer = block.get_submodule(half.writer)
        assert isinstance(writer, nn.Linear)
        gain = _gain(block, half)
        sizes = (writer.in_features, writer.out_features, None if gain is None else gain.square())
        fit, held = Moments(*sizes), Moments(*sizes)
        for number, x_BSK, missing_BSE, w_BS in self._missing(block, half, target):
            moments = held if self.held[number] else fit
            moments.add(x_BSK.flatten(0, 1), missing_BSE.flatten(0, 1), w_BS.flatten())
        if not (fit.finite() and held.finite()):
            raise _not_finite(index)
        if fit.tokens + held.tokens < writer.in_features:
            self.singular[writer.in_features] = fit.tokens + held.tokens
        start = self.strengths.get(half.axis, 1.0)
        found = correct(fit, held, bias=writer.bias is not None, start=start)
        if found.error_before <= ROUNDING * held.tokens:
            share = found.error_before / held.tokens
            return Step(index, half.axis, None, share, share), False
        changed = found.strength is not None and found.error_after < found.error_before
        if changed:
            self.strengths[half.axis] = found.strength or start
            _apply(writer, found)
        return Step(
            index, half.axis, found.strength, found.error_before / held.tokens,
            found.error_after / held.tokens,
        ), changed  # fmt: skip

    def _missing(
        self, block: nn.Module, half: Branch, target: int
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Batch, writer's inputs, what its outputs lack, and the tokens' weights."""
        writer = block.get_submodule(half.writer)
        gain = _gain(block, half)
        with watching(block, self.halves, until=half) as seen:
            for number, (_, calls) in enumerate(self.calls):
                h_BSE = self.states.get(_CUT, number)
                run_until(block, calls[target], h_BSE)
                x_BSK = seen.inputs[half.axis]
                own_BSE = None
                if half.norm is not None or not self.additive:
                    own_BSE = self.states.get(_key(half, "own"), number)
                if self.additive:
                    wanted_BSE = self.states.get(_key(half, "stream"), number)
                    w_BS = _inverse_energy(wanted_BSE)
                    for before in self.halves[: self.halves.index(half)]:
                        h_BSE = h_BSE + seen.contributions[before.axis]
                    y_BSE = wanted_BSE - h_BSE
                    if half is self.halves[-1]:
                        self.states.put(_key(half, "x"), number, x_BSK)
                        self.states.put(_key(half, "before"), number, h_BSE)
                else:
                    assert own_BSE is not None
                    y_BSE, w_BS = own_BSE, _inverse_energy(own_BSE)
                if gain is not None:
                    assert own_BSE is not None
                    y_BSE, w_BS = _before_norm(y_BSE, own_BSE, w_BS, gain)
                yield number, x_BSK, y_BSE - _linear(writer, x_BSK), w_BS

    def _save(self, block: nn.Module, half: Branch, target: int) -> None:
        writer = block.get_submodule(half.writer)
        prefix = f"{self.view.family.blocks}.{target}.{half.writer}"
        file = self.directory / f"{target}.{half.axis}.safetensors"
        tensors = {f"{prefix}.{name}": tensor for name, tensor in writer.named_parameters()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
        self.files |= dict.fromkeys(tensors, file)

    def fit_readout(self, progress: Progress) -> tuple[float, float] | None:
        """Fit the final norm's gain; the divergence before and after, unless it is left alone."""
        fit, held = (
            [
                (self.batches[n], self.states.get(_SOURCE, n), self.states.get(_CUT, n))
                for n in some(
                    [n for n, is_held in enumerate(self.held) if is_held == wanted],
                    self.batches[0].numel(),
                )
            ]
            for wanted in (False, True)
        )
        found = fit_gain(self.source, self.cut, fit, held, progress=progress)
        if found is None:
            return None
        name = gain_name(self.cut)
        assert name is not None
        file = self.directory / "readout.safetensors"
        save_file({name: found[0].contiguous()}, file)
        self.files[name] = file
        return found[1], found[2]

    def _kept(self, h_BSD: Tensor) -> Tensor:
        h_BSE = self._surviving(h_BSD)
        return h_BSE if self.scale == 1.0 else h_BSE * self.scale

    def _surviving(self, h_BSD: Tensor) -> Tensor:
        return h_BSD if self.alive is None else h_BSD[..., self.alive]

    def replaced(self) -> dict[str, Callable[[], Tensor]]:
        """What was solved, read from its file when it is asked for."""
        return {
            name: lambda name=name, file=file: load_file(file)[name]
            for name, file in self.files.items()
        }

    def warnings(self) -> tuple[str, ...]:
        """What a user should know of the tokens given."""
        return tuple(
            f"{tokens} calibration tokens do not determine matrices of {columns} columns, so that "
            f"the repair is weak; {4 * columns} tokens or more would do "
            f"(--samples {math.ceil(4 * columns / self._length())} at this length)."
            for columns, tokens in self.singular.items()
        )

    def _length(self) -> int:
        return self.states.get(_CUT, 0).shape[1]


def _key(half: Branch, what: str) -> frozenset[int]:
    """A key of the states' store for something that belongs to a branch."""
    kind = ("stream", "own", "x", "before").index(what)
    return frozenset({-3 - 2 * kind - ("heads", "mlp").index(half.axis)})


def _require_finite(h_BSD: Tensor, index: int) -> None:
    if not bool(h_BSD.isfinite().all()):
        raise _not_finite(index)


def _not_finite(index: int) -> ShearlingError:
    return ShearlingError(
        f"block {index} gives states that are not finite numbers on the calibration text; "
        "its weights hold NaN or infinity, or overflow: fetch the checkpoint again."
    )


def _inverse_energy(h_BSE: Tensor) -> Tensor:
    """Weights (B, S) by which every token's state counts alike, however long it is."""
    return 1 / h_BSE.square().sum(-1).clamp_min(1e-12)


def _gain(block: nn.Module, half: Branch) -> Tensor | None:
    """The factor of each channel in the norm behind a writer, if there is one."""
    if half.norm is None:
        return None
    writer = block.get_submodule(half.writer)
    assert isinstance(writer, nn.Linear)
    return block.get_submodule(half.norm)(torch.ones(1, writer.out_features))[0]


def _before_norm(
    y_BSE: Tensor, own_BSE: Tensor, w_BS: Tensor, gain_E: Tensor
) -> tuple[Tensor, Tensor]:
    """What a writer must give so that the norm behind it gives ``y``, at its size in the source.

    A channel that the norm all but silences tells nothing of what came before it.
    """
    rms_BS1 = own_BSE.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
    known = gain_E.abs() > 1e-3 * gain_E.abs().max()
    wanted = torch.where(known, y_BSE / torch.where(known, gain_E, 1.0) * rms_BS1, own_BSE)
    return wanted, w_BS / rms_BS1.squeeze(-1).square()


def _linear(writer: nn.Module, x_BSK: Tensor) -> Tensor:
    """The writer's own product, without the hooks that watch it."""
    assert isinstance(writer, nn.Linear)
    return nn.functional.linear(x_BSK, writer.weight, writer.bias)


def _apply(writer: nn.Linear, found: Correction) -> None:
    weight_EK = writer.weight + found.weight_KD.T.to(writer.weight.dtype)
    writer.weight = nn.Parameter(weight_EK.contiguous(), requires_grad=False)
    if writer.bias is not None:
        bias_E = writer.bias + found.bias_D.to(writer.bias.dtype)
        writer.bias = nn.Parameter(bias_E, requires_grad=False)
