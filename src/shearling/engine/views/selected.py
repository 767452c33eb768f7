"""What a selection takes of a tensor, silences in it, and puts back into its place.

Along most dimensions the same indices survive everywhere. Of a tensor that holds a matrix of every
expert of a block, each expert keeps neurons of its own
(:class:`shearling.table.values.ByExpert`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from shearling.table.values import ByExpert, Selection


def taken(tensor: Tensor, selection: Selection) -> Tensor:
    """What survives of a tensor of the source."""
    for dim, indices in enumerate(selection.indices):
        if indices is not None:
            tensor = tensor.index_select(dim, torch.tensor(indices, device=tensor.device))
    own = selection.by_expert
    return tensor if own is None else tensor.gather(own.dim, _places(own, tensor))


def silenced(tensor: Tensor, selection: Selection) -> Tensor:
    """The source's tensor, zeros where something is removed; tokens stay what they are."""
    for dim, indices in enumerate(selection.indices):
        if indices is not None and "vocab" not in selection.row.dims[dim].axes:
            dead = torch.ones(tensor.shape[dim], dtype=torch.bool, device=tensor.device)
            dead[list(indices)] = False
            sizes = [-1 if each == dim else 1 for each in range(tensor.ndim)]
            tensor = tensor.masked_fill(dead.view(sizes), 0)
    own = selection.by_expert
    if own is None:
        return tensor
    experts = torch.tensor(_experts(selection, len(tensor)), device=tensor.device)
    kept = tensor.index_select(0, experts)
    places = _places(own, kept)
    kept = torch.zeros_like(kept).scatter(own.dim, places, kept.gather(own.dim, places))
    return tensor.index_copy(0, experts, kept)


def put_back(tensor: Tensor, selection: Selection, sizes: tuple[int, ...]) -> Tensor:
    """A tensor of the result in the source's geometry ``sizes``, zeros where it has nothing."""
    own = selection.by_expert
    if own is not None:
        whole = (*tensor.shape[: own.dim], sizes[own.dim], *tensor.shape[own.dim + 1 :])
        tensor = tensor.new_zeros(whole).scatter(own.dim, _places(own, tensor), tensor)
    for dim, indices in enumerate(selection.indices):
        if indices is not None:
            whole = (*tensor.shape[:dim], sizes[dim], *tensor.shape[dim + 1 :])
            places = torch.tensor(indices, device=tensor.device)
            tensor = tensor.new_zeros(whole).index_copy(dim, places, tensor)
    assert tuple(tensor.shape) == sizes, f"{selection.target} is not of the result's shape"
    return tensor


def _experts(selection: Selection, count: int) -> tuple[int, ...]:
    """The surviving experts of so many."""
    experts = selection.indices[0]
    return tuple(range(count)) if experts is None else experts


def _places(own: ByExpert, tensor: Tensor) -> Tensor:
    """Where each expert's survivors are, an index for every number of what survives."""
    count = len(own.indices[0])
    sizes = [1] * tensor.ndim
    sizes[0], sizes[own.dim] = len(own.indices), count
    places = torch.tensor(own.indices, device=tensor.device).view(sizes)
    return places.expand(*tensor.shape[: own.dim], count, *tensor.shape[own.dim + 1 :])
