"""Listening to the blocks of a model while it runs: one walk for all axes asked for.

Shapes: B sequences of a batch, S positions, D hidden; T = B S tokens; C columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shearling.engine.pieces import piece, together
from shearling.engine.ranks import ALONE, Ranks
from shearling.engine.walk import Step, check_state
from shearling.errors import ShearlingError
from shearling.scoring.units.places import STREAM, Tap
from shearling.scoring.units.statistics import Inlet, Sums


@dataclass(slots=True)
class _Heard:
    """A module's input (B, S, C) in one batch, and the loss's gradient at it; piece by piece."""

    xs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)

    def hear(self, x: Tensor) -> None:
        """Note a piece's input, in place of what a run that failed left."""
        self.xs[piece() :], self.gradients[piece() :] = [x], []

    def keep(self, gradient: Tensor) -> None:
        """Note the gradient at the last input."""
        self.gradients.append(gradient.detach())


def observe(
    walk: Iterator[Step],
    taps: Sequence[Tap],
    wanted: frozenset[str],
    *,
    ranks: Ranks = ALONE,
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
        ranks: who share the sequences; all get the sums over all of them.
        gradient_scale: what to multiply gradients by; None if the walk has none.

    Yields:
        A block's number and its inlets by axis; none of an axis whose units it has not.

    Raises:
        ShearlingError: activations or gradients that are not finite; names the block.
    """
    for step in walk:
        sums: dict[tuple[str, tuple[str, ...]], Sums] = {}
        here = [tap.within(step.block) for tap in taps]
        paths = {path for tap in here for path in tap.paths}
        with _listening(step.block, paths, gradients=gradient_scale is not None) as heard:
            for run in step.passes:
                check_state(step.index, run.after_BSD)
                weight_T = _inverse_energy(run.after_BSD)
                for tap in here:
                    even = torch.ones_like(weight_T) if tap.axis == STREAM else weight_T
                    for sharing in _sharing(heard, tap.paths):
                        taken = sums.setdefault((tap.axis, sharing), Sums(wanted, tap.width))
                        x_TC = together(heard[sharing[0]].xs).flatten(0, -2)
                        gradient_TC = None
                        if gradient_scale is not None:
                            gradient_TC = gradient_scale * _gradient(heard, sharing)
                        taken.add(x_TC, even, gradient_TC)
                heard.clear()
        for taken in sums.values():
            taken.add_up(ranks)
        yield step.index, _inlets(step.index, step.block, sums)


@contextmanager
def _listening(
    block: nn.Module, paths: set[str], *, gradients: bool
) -> Generator[dict[str, _Heard]]:
    """Note what enters the modules at ``paths``, and on the way back its gradient."""
    heard: dict[str, _Heard] = {}

    def listener(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            # Detached, or hook, gradient and graph would hold each other: a cycle per batch.
            heard.setdefault(path, _Heard()).hear(args[0].detach())
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
        by_input.setdefault(heard[path].xs[0].data_ptr(), []).append(path)
    return [tuple(sharing) for sharing in by_input.values()]


def _gradient(heard: dict[str, _Heard], sharing: tuple[str, ...]) -> Tensor:
    """The gradient (T, C) at an input, over all modules that share it."""
    parts = [together(heard[path].gradients) for path in sharing if heard[path].gradients]
    return torch.stack(parts).sum(0).flatten(0, -2)


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
