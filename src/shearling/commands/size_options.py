"""Options of how much a cut leaves, and the sizes that they ask for."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated

import typer

from shearling.commands.options import numbers
from shearling.commands.target_options import TargetOptions, spent
from shearling.errors import ShearlingError
from shearling.files.amounts import with_point

if TYPE_CHECKING:
    from shearling.pruning.size import Size

Sizes = Annotated[
    list[str] | None,
    typer.Option(
        help="Sizes after the cut, such as layers=24,mlp=1024; keys are layers, hidden, heads, "
        "kv_heads, linear_heads, mlp, experts, expert_mlp (of one expert) and vocab; what is not "
        "named stays. May be repeated, for several models at once."
    ),
]
Params = Annotated[
    str | None,
    typer.Option(
        help="Parameters of the result, such as 0.8x or 113M; we choose the shape. Several, such "
        "as 0.9x,0.8x,0.7x, make as many models at once."
    ),
]
ActiveParams = Annotated[
    str | None,
    typer.Option(help="Of a mixture of experts: parameters that one token meets; as --params."),
]
Nested = Annotated[
    bool,
    typer.Option(
        "--nested",
        help="Of several sizes: each keeps only blocks and units that the next larger one keeps.",
    ),
]
Layers = Annotated[int | None, typer.Option(help="Blocks to keep; as --shape layers=N.")]
Remove = Annotated[str | None, typer.Option(help="Blocks to remove, separated by commas, from 0.")]


@dataclass(frozen=True, kw_only=True)
class SizeOptions:
    """How much goes."""

    shape: Sizes = None
    params: Params = None
    active_params: ActiveParams = None
    layers: Layers = None
    remove: Remove = None
    nested: Nested = False


def sizes_of(given: SizeOptions, target: TargetOptions) -> list[Size]:
    """What is to be left, in one model or several; none where a shape has to be searched for."""
    from shearling.pruning.size import Size

    params = _listed(given.params, "--params")
    active, shapes = _listed(given.active_params, "--active-params"), given.shape or []
    remove = None if given.remove is None else tuple(numbers(given.remove, "--remove"))
    named = {"--shape": given.shape, "--layers": given.layers, "--remove": given.remove}
    several = [*params[1:], *active[1:], *(["nested"] if given.nested else [])]
    how = spent(target, named, several=bool(several))
    if target.asked:
        return []

    def size(number: int) -> Size:
        several: list[list[str]] = [params, active, shapes]
        one = [given[min(number, len(given) - 1)] if given else None for given in several]
        return Size(
            params=one[0], active_params=one[1], shape=one[2], layers=given.layers,
            remove=remove, **how,
        )  # fmt: skip

    return [size(number) for number in range(max(map(len, (params, active, shapes, [None]))))]


def _listed(text: str | None, option: str) -> list[str]:
    """Sizes separated by commas.

    Raises:
        ShearlingError: one is missing, or a comma stands where a decimal point is meant.
    """
    if text is None:
        return []
    parts = [part.strip() for part in text.split(",")]
    for one, other in pairwise(parts):
        if meant := with_point(f"{one},{other}"):
            raise ShearlingError(
                f"{option} {text!r} was given, but a comma separates sizes, and a decimal point "
                f"was expected, as in {meant}."
            )
    if not all(parts):
        raise ShearlingError(
            f"{option} {text!r} was given, but a size is missing; give sizes such as 0.8x or 113M, "
            "separated by commas."
        )
    return parts
