"""Listening to the blocks of a model while it runs: one walk for all axes asked for.

Shapes: B sequences of a batch, S positions, D hidden; T = B S tokens; C columns of a matrix.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shearling.criteria.units.places import STREAM, Tap
from shearling.criteria.units.statistics import Inlet, Sums
from shearling.errors import ShearlingError
from shearling.progress import Progress
from shearling.stream import BlockStream
from shearling.wavefront import Removed, States

_STATE: Removed = frozenset()
# A block's number, the block, and an iterator that runs a batch at every step and gives the state
# after the block.
Walk = Iterator[tuple[int, nn.Module, Iterator[Tensor]]]


def forward_walk(stream: BlockStream, ids_NS: Tensor, stage: str, tell: Progress) -> Walk:
    """Hand out the blocks in order, each with an iterator of its passes, to be exhausted."""
    with tempfile.TemporaryDirectory(prefix="shearling-") as scratch:
        states = States(None if stream.resident else Path(scratch))
        calls = []
        for number, ids_BS in enumerate(stream.batches(ids_NS)):
            with torch.no_grad():
                h_BSD, call = stream.begin(ids_BS)
            states.put(_STATE, number, h_BSD)
            calls.append(call)

        def passes(index: int, block: nn.Module) -> Iterator[Tensor]:
            for number, call in enumerate(calls):
                with torch.no_grad():
                    h_BSD = call[index](block, states.get(_STATE, number))
                states.put(_STATE, number, h_BSD)
                yield h_BSD

        for index in range(stream.depth):
            with stream.block(index) as block:
                yield index, block, passes(index, block)
            tell(stage, index + 1, stream.depth)


@dataclass(slots=True)
class _Heard:
    """A module's input (B, S, C) in one batch, and the loss's gradient at it."""

    x: Tensor
    gradient: Tensor | None = None

    def keep(self, gradient: Tensor) -> None:
        self.gradient = gradient.detach()


def observe(
    walk: Walk,
    taps: Sequence[Tap],
    wanted: frozenset[str],
    *,
    gradient_scale: float | None = None,
) -> Iterator[tuple[int, dict[str, list[Inlet]]]]:
    """Take sums over tokens of what enters the modules of ``taps``, block by block.

    Matrices that share an input (query, key and value) are one inlet. Tokens are weighted by the
    inverse energy of the state after the block; for the residual stream's own channels evenly,
    as the norm before its readers has made tokens alike.

    Args:
        walk: hands out the blocks.
        taps: one for each axis.
        wanted: which sums.
        gradient_scale: what to multiply gradients by; None if the walk has none.

    Yields:
        A block's number and its inlets by axis.

    Raises:
        ShearlingError: activations or gradients that are not finite; names the block.
    """
    paths = {path for tap in taps for path in tap.paths}
    for index, block, passes in walk:
        sums: dict[tuple[str, tuple[str, ...]], Sums] = {}
        with _listening(block, paths, gradients=gradient_scale is not None) as heard:
            for after_BSD in passes:
                check_state(index, after_BSD)
                weight_T = _inverse_energy(after_BSD)
                for tap in taps:
                    even = torch.ones_like(weight_T) if tap.axis == STREAM else weight_T
                    for sharing in _sharing(heard, tap.paths):
                        taken = sums.setdefault((tap.axis, sharing), Sums(wanted, tap.width))
                        x_TC = heard[sharing[0]].x.flatten(0, -2)
                        gradient_TC = None
                        if gradient_scale is not None:
                            gradient_TC = gradient_scale * _gradient(heard, sharing)
                        taken.add(x_TC, even, gradient_TC)
                heard.clear()
        yield index, _inlets(index, block, sums)


def check_state(index: int, h_BSD: Tensor) -> None:
    """Raise ShearlingError unless the state after block ``index`` is finite."""
    if not bool(h_BSD.isfinite().all()):
        raise ShearlingError(
            f"block {index} gives activations that are not finite numbers; its weights, or those "
            "before it, hold NaN or infinity, or overflow: fetch the checkpoint again."
        )


@contextmanager
def _listening(
    block: nn.Module, paths: set[str], *, gradients: bool
) -> Generator[dict[str, _Heard]]:
    """Note what enters the modules at ``paths``, and on the way back its gradient."""
    heard: dict[str, _Heard] = {}

    def listener(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            # Detached, or hook, gradient and graph would hold each other: a cycle per batch.
            heard[path] = _Heard(args[0].detach())
            if not gradients:
                return None
            # A view of its own, so that this module's part of the gradient is told apart.
            x = args[0].view_as(args[0])
            x.register_hook(heard[path].keep)
            return (x, *args[1:])

        return hook

    handles = [block.get_submodule(p).register_forward_pre_hook(listener(p)) for p in paths]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _sharing(heard: dict[str, _Heard], paths: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Paths by input: modules that were handed the same tensor stand together."""
    by_input: dict[int, list[str]] = {}
    for path in paths:
        by_input.setdefault(heard[path].x.data_ptr(), []).append(path)
    return [tuple(sharing) for sharing in by_input.values()]


def _gradient(heard: dict[str, _Heard], sharing: tuple[str, ...]) -> Tensor:
    """The gradient (T, C) at an input, over all modules that share it."""
    parts = [heard[path].gradient for path in sharing]
    return torch.stack([part for part in parts if part is not None]).sum(0).flatten(0, -2)


def _inverse_energy(h_BSD: Tensor) -> Tensor:
    """1 / ||h_t||^2 of each token (T); 0 where the state is zero."""
    energy_T = h_BSD.double().square().sum(-1).flatten()
    return torch.where(energy_T > 0, 1 / energy_T, 0.0)


def _inlets(
    index: int, block: nn.Module, sums: dict[tuple[str, tuple[str, ...]], Sums]
) -> dict[str, list[Inlet]]:
    inlets: dict[str, list[Inlet]] = {}
    for (axis, paths), taken in sums.items():
        if not all(bool(total.isfinite().all()) for total in taken.sums.values()):
            raise ShearlingError(
                f"block {index} has activations or gradients that are not finite numbers; the "
                "model's weights hold NaN or infinity, or overflow: fetch the checkpoint again."
            )
        weights = [block.get_submodule(path).get_parameter("weight").detach() for path in paths]
        inlets.setdefault(axis, []).append(Inlet(taken.sums, taken.tokens, torch.cat(weights)))
    return inlets
