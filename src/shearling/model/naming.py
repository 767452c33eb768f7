"""From tensors as a checkpoint stores them to parameters as transformers' models hold them.

They differ where a checkpoint has a matrix for each expert and the model one for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from shearling.table.families import Home


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
