"""The only loops over blocks: forward, and forward and back.

A walk hands out the blocks in order, each as a :class:`Step` whose passes run what the walk says
through it. Weights are read once (twice with gradients), whatever number of states goes along.

Shapes: N sequences in batches of B; S positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from shearling.engine.calls import Call
from shearling.engine.pieces import together
from shearling.engine.ranks import Ranks
from shearling.engine.states import MAIN, Key, States
from shearling.engine.stream import BlockStream
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent

SCRATCH_BYTES = 8 * 2**30  # of states on disk at a time, where only the last ones are wanted

Runs = Sequence[tuple[Key, int]]  # states by key and batch


@dataclass
class Text:
    """Tokens in batches, on their way through a model's blocks.

    Attributes:
        stream: the model.
        states: where they are now; shared by models that walk side by side.
        key: under which key their states are kept.
        batches: tokens (B, S).
        calls: for each batch, a call for each block.
    """

    stream: BlockStream
    states: States
    key: Key = MAIN
    batches: list[Tensor] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)

    def begin(self, batches: Sequence[Tensor]) -> Text:
        """Embed batches of tokens (B, S); their states then stand before the first block."""
        for ids_BS in batches:
            with torch.no_grad():
                h_BSD, calls = self.stream.begin(ids_BS)
            self.states.put(self.key, len(self.batches), h_BSD)
            self.batches.append(ids_BS)
            self.calls.append(calls)
        return self

    def runs(self) -> Runs:
        """Every batch once."""
        return [(self.key, number) for number in range(len(self.batches))]


@dataclass(frozen=True, slots=True)
class Pass:
    """One state's run through a block.

    Attributes:
        key: which state.
        number: its batch.
        before_BSD: the state before the block.
        after_BSD: the state behind it.
    """

    key: Key
    number: int
    before_BSD: Tensor
    after_BSD: Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """A block's turn in a walk.

    Attributes:
        index: its number.
        block: the block, its weights loaded.
        passes: runs the states through it, one at every step of the iteration; to be exhausted.
    """

    index: int
    block: nn.Module
    passes: Iterator[Pass]

    def finish(self) -> None:
        """Run all passes."""
        for _ in self.passes:
            pass


def forward(
    text: Text,
    stage: str = "",
    tell: Progress = silent,
    *,
    runs: Callable[[int], Runs] | None = None,
    blocks: range | None = None,
    merged: bool = False,
) -> Iterator[Step]:
    """Walk through the blocks in order.

    Args:
        text: begun; states are moved on in place.
        stage: what to call this in the progress.
        tell: told the blocks done.
        runs: block -> states that it runs, if that is not every batch once; a block that runs
            none is not read.
        blocks: which blocks, if not all; a later walk goes on from there.
        merged: run states of one batch together, where the place takes more tokens at a time;
            nobody may be watching the block then.

    Yields:
        A step for each block. Its weights are let go of when the next one is asked for.
    """
    stream = text.stream
    for index in range(stream.depth) if blocks is None else blocks:
        wanted = text.runs() if runs is None else runs(index)
        if wanted:
            following = index + 1 if index + 1 < stream.depth else None
            with stream.block(index, following) as block:
                together = stream.place.merged_tokens if merged else 0
                yield Step(index, block, _forward_passes(text, index, block, wanted, together))
        if stage:
            tell(stage, index + 1, stream.depth)


def _forward_passes(
    text: Text, index: int, block: nn.Module, wanted: Runs, together: int
) -> Iterator[Pass]:
    for group in _groups(text, wanted, together):
        befores = [text.states.get(key, number) for key, number in group]
        number = group[0][1]
        call = text.calls[number][index]
        if len(group) > 1:
            call = text.stream.calls_for(text.batches[number].repeat(len(group), 1))[index]
        with torch.no_grad():
            h_BSD = befores[0] if len(group) == 1 else torch.cat(befores)
            after_BSD = text.stream.run(block, call, h_BSD)
        afters = after_BSD.split(len(befores[0]))
        for (key, at), before, after in zip(group, befores, afters, strict=True):
            text.states.put(key, at, after)
            yield Pass(key, at, before, after)


def _groups(text: Text, wanted: Runs, together: int) -> Iterator[Runs]:
    """Runs of one batch under several keys, as many as ``together`` tokens hold; else one."""
    group: list[tuple[Key, int]] = []
    for key, number in wanted:
        full = (len(group) + 1) * text.batches[number].numel() > together
        if group and (full or group[0][1] != number):
            yield group
            group = []
        group.append((key, number))
    if group:
        yield group


def backward(
    stream: BlockStream,
    ids_NS: Tensor,
    stage: str,
    *,
    weights: bool,
    tell: Progress = silent,
    forward_check: Callable[[int, Tensor], None] = lambda index, h_BSD: None,
) -> Iterator[Step]:
    """Walk forward through the blocks, then backward, handing out each block on the way back.

    Args:
        stream: the model.
        ids_NS: calibration tokens; the loss L is the mean NLL of the predicted ones.
        stage: what to call this in the progress.
        weights: whether gradients at the weights are wanted, summed over the passes.
        tell: told the block runs done.
        forward_check: told each state (B, S, D) on the way forward, and the block that it leaves.

    Yields:
        A step for each block, last one first; before a large vocabulary, some words stand for it
        (:mod:`shearling.engine.words`). A pass runs a batch through it and back. Ranks share
        the sequences; behind the last pass every rank has the gradients of all.
    """
    depth, ranks = stream.depth, stream.place.ranks.of(len(ids_NS))
    predicted = ids_NS.shape[0] * (ids_NS.shape[1] - 1)
    with States(stream.place) as states:
        text = Text(stream, states).begin(stream.batches(ranks.share(ids_NS)))
        # Keyed by how many blocks the state has passed, the same store serves both ways.
        for _, number in text.runs():
            states.move(MAIN, 0, number)
        _keep_all(text, stage, tell, forward_check)
        last = ((states.get(depth, number), ids) for number, ids in enumerate(text.batches))
        words = stream.likely_words(last, ids_NS, ranks, tokens=ids_NS.numel())
        with stream.abridged(words):
            for number, ids_BS in enumerate(text.batches):
                after_BSD = states.take(depth, number)
                gradient_BSD = _head_gradient(stream, after_BSD, ids_BS, predicted)
                states.put(_GRADIENT, number, gradient_BSD)
        for index in reversed(range(depth)):
            with stream.block(index, index - 1 if index else None) as block:
                block.requires_grad_(weights)
                try:
                    yield Step(index, block, _backward_passes(text, index, block, ranks))
                finally:
                    block.requires_grad_(False)
                    block.zero_grad(set_to_none=True)
            tell(stage, 2 * depth - index, 2 * depth)


_GRADIENT: Key = "gradient"


def _keep_all(text: Text, stage: str, tell: Progress, check: Callable[[int, Tensor], None]) -> None:
    """Walk forward, keeping the state before every block."""
    depth = text.stream.depth
    for index in range(depth):
        with text.stream.block(index, index + 1 if index + 1 < depth else None) as block:
            for number, calls in enumerate(text.calls):
                with torch.no_grad():
                    h_BSD = text.stream.run(block, calls[index], text.states.get(index, number))
                check(index, h_BSD)
                text.states.put(index + 1, number, h_BSD)
        tell(stage, index + 1, 2 * depth)


def _backward_passes(text: Text, index: int, block: nn.Module, ranks: Ranks) -> Iterator[Pass]:
    """Run each batch forward and back; the gradient moves from behind the block to before it."""
    for number in range(len(text.batches)):
        before_BSD = text.states.take(index, number).detach()
        gradient_BSD = text.states.get(_GRADIENT, number)
        ran = text.stream.pieces.run(
            partial(_back, text.stream, index, block), before_BSD, gradient_BSD
        )
        after_BSD, gradient_BSD = (together(list(parts)) for parts in zip(*ran, strict=True))
        text.states.put(_GRADIENT, number, gradient_BSD)
        yield Pass(index, number, before_BSD, after_BSD)
    ranks.add(*(weight.grad for weight in block.parameters() if weight.grad is not None))


def _back(
    stream: BlockStream, index: int, block: nn.Module, before_BSD: Tensor, gradient_BSD: Tensor
) -> tuple[Tensor, Tensor]:
    """The state behind a block, and the gradient before it; the weights' are added to theirs.

    That is done at the end, so that a run that fails leaves none behind.
    """
    call = stream.calls_for(torch.zeros(before_BSD.shape[:2], dtype=torch.long))[index]
    weights = [weight for weight in block.parameters() if weight.requires_grad]
    before_BSD = before_BSD.detach().requires_grad_(True)
    with torch.enable_grad():  # whatever the caller has switched off
        after_BSD = stream.run_at_once(block, call, before_BSD)
        gradient_BSD, *more = torch.autograd.grad(
            after_BSD, [before_BSD, *weights], gradient_BSD, allow_unused=True
        )
    for weight, gradient in zip(weights, more, strict=True):
        if gradient is not None:
            weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
    return after_BSD.detach(), gradient_BSD


def _head_gradient(stream: BlockStream, h_BSD: Tensor, ids_BS: Tensor, predicted: int) -> Tensor:
    """dL/dh of the state that leaves the last block.

    As in ``BlockStream.nll`` the logits of one slice are alive at a time, here with their graph.
    """

    def back(h_BSD: Tensor, ids_BS: Tensor) -> Tensor:
        leaf = h_BSD.detach().requires_grad_(True)
        with torch.enable_grad():
            (stream.nll(leaf, ids_BS).sum() / predicted).backward()
        assert leaf.grad is not None
        return leaf.grad

    gradients: list[Tensor] = []
    for slices in stream.slices(h_BSD, ids_BS):
        gradients += stream.run_head(back, *slices)
    return torch.cat(gradients)


def last_states(
    stream: BlockStream,
    batches: Sequence[Tensor],
    tell: Callable[[int], None] = lambda number: None,
) -> Iterator[Tensor]:
    """The state (B, S, D) that leaves the last block, of each batch of ids (B, S), in order.

    In memory a batch goes all the way by itself. Where blocks have to be fetched, SCRATCH_BYTES of
    states wait at a time, and blocks are fetched once for as many.

    Args:
        stream: the model.
        batches: tokens.
        tell: called with a batch's number whenever it has left a block.
    """
    if not batches:
        return
    width = stream.checkpoint.shape["hidden"] * stream.place.dtype.itemsize
    most = max(1, SCRATCH_BYTES // (max(ids.numel() for ids in batches) * width))
    each = 1 if stream.place.weights == "resident" else most
    for first in range(0, len(batches), each):
        group = batches[first : first + each]
        with States(stream.place) as states:
            text = Text(stream, states).begin(group)
            for step in forward(text):
                for run in step.passes:
                    tell(first + run.number)
            for _, number in text.runs():
                yield states.take(MAIN, number)


def check_state(index: int, h_BSD: Tensor) -> None:
    """Raise ShearlingError unless the state after block ``index`` is finite."""
    if not bool(h_BSD.isfinite().all()):
        raise ShearlingError(
            f"block {index} gives activations that are not finite numbers; its weights, or those "
            "before it, hold NaN or infinity, or overflow: fetch the checkpoint again."
        )


@torch.inference_mode()
def logits_of(stream: BlockStream, ids_BS: Tensor, blocks: Sequence[int] | None = None) -> Tensor:
    """Logits (B, S, V) of one batch of tokens, by the blocks named or by all."""
    with States(stream.place) as states:
        text = Text(stream, states).begin([ids_BS])
        for step in forward(
            text, runs=lambda index: text.runs() if blocks is None or index in blocks else []
        ):
            step.finish()
        return stream.logits(states.get(MAIN, 0), ids_BS)
