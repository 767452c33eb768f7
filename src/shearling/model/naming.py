"""From tensors as a checkpoint stores them to parameters as transformers' models hold them.

They differ where a checkpoint has a matrix for each expert and the model one for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from shearling.model.stored import StoredTensor
from shearling.table.axes import EXPERTS
from shearling.table.families import Family, Home
from shearling.table.layout import Layout
from shearling.table.values import Shape


def unstacked(
    headers: Mapping[str, StoredTensor], layout: Layout, shape: Shape, family: Family
) -> tuple[dict[str, StoredTensor], dict[str, Home]]:
    """Headers as if experts' tensors were stored one by one, and where these are, if they are not.

    Some checkpoints hold those of all experts of a block in one, as transformers' models do.
    """
    apart, homes = dict(headers), dict[str, Home]()
    for row in (row for row in layout.stored if row.name in family.stacked):
        for block in range(shape["layers"]):
            for name, home in family.homes(row, block, shape).items():
                whole = headers.get(home.parameter)
                if whole is None:
                    break
                experts, *sizes = whole.shape
                if experts == shape[EXPERTS]:
                    whole = replace(whole, shape=(sizes[0] // home.parts, *sizes[1:]))
                apart[name], homes[name] = whole, home
    for home in homes.values():
        apart.pop(home.parameter, None)
    return apart, homes


def gathered(tensors: Iterable[tuple[str, Tensor]], homes: Mapping[str, Home]) -> dict[str, Tensor]:
    """Parameter -> its values, from tensors by their names in a checkpoint.

    Args:
        tensors: names and values, in any order; of a stacked parameter, all that it holds.
        homes: where each is held.
    """
    parameters: dict[str, Tensor] = {}
    pieces: dict[str, dict[tuple[int, int], Tensor]] = {}
    for name, tensor in tensors:
        home = homes[name]
        if home.expert is None:
            parameters[home.parameter] = tensor
        else:
            pieces.setdefault(home.parameter, {})[home.expert, home.part] = tensor
    for parameter, stack in pieces.items():
        parameters[parameter] = _stack(stack)
    return parameters


def _stack(pieces: dict[tuple[int, int], Tensor]) -> Tensor:
    """The parameter (experts, parts * rows, columns); its pieces are let go of one by one."""
    experts, parts = (1 + max(numbers) for numbers in zip(*pieces, strict=True))
    rows, columns = pieces[0, 0].shape
    stacked = pieces[0, 0].new_empty(experts, parts * rows, columns)
    for expert, part in sorted(pieces):
        stacked[expert, part * rows : (part + 1) * rows] = pieces.pop((expert, part))
    return stacked
