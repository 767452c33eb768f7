"""A model in another basis of its residual stream: read through a matrix, or written down so.

What :mod:`shearling.repair.rotate` chooses is applied here. A rotated checkpoint stands in for its
source: every tensor is turned as it is read, one at a time.

Shapes: D hidden, K of them to be kept, R rows and C columns of a matrix.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from shearling.files.progress import Progress
from shearling.files.writer import check_space, new_directory, write_json, write_weights
from shearling.model.checkpoint import Checkpoint
from shearling.model.dtypes import torch_dtype
from shearling.model.tensors import StoredTensors, Tensors
from shearling.table.axes import MLPS, Dim, Row
from shearling.table.families.base import Affine
from shearling.table.layout import Layout
from shearling.table.values import Shape

STREAM = Dim.parse("hidden")
TIED = "tie_word_embeddings"
_ROWS = 4096  # of a matrix that are turned together, in double precision


@dataclass(frozen=True, slots=True)
class Norms:
    """Names of the norms before attention, before the MLP and before the head."""

    heads: str
    mlp: str
    head: str

    def before(self, row: Row) -> str:
        """The norm whose output a reader reads."""
        if not row.in_block:
            return self.head
        # A router and a shared expert's gate write no axis; latent projections are attention's.
        axes = row.output.axes
        return self.mlp if row.of_experts or not axes or axes & {*MLPS} else self.heads

    def names(self, layers: int) -> list[str]:
        """All of them, in every block."""
        return [n.format(i) for n in (self.heads, self.mlp) for i in range(layers)] + [self.head]


def reads(row: Row) -> bool:
    """Whether a tensor is multiplied with the stream behind a norm."""
    matrix = row.role not in ("norm", "bias", "embedding")
    return matrix and STREAM in row.dims and row.output != STREAM


def stream_last(row: Row, tensor: Tensor) -> Tensor:
    """A tensor, experts' stacked ones too, with the stream's dimension as the last."""
    return tensor.movedim(row.dims.index(STREAM), -1)


def norms_of(layout: Layout) -> Norms | None:
    """The norms over the stream; a table names those of a block in the order in which they run."""
    rows = [row for row in layout.stored if row.role == "norm" and row.dims == (STREAM,)]
    inside = [row.name for row in rows if row.in_block]
    outside = [row.name for row in rows if not row.in_block]
    return Norms(*inside, *outside) if (len(inside), len(outside)) == (2, 1) else None


def tied_heads(layout: Layout) -> dict[str, str]:
    """Head -> the embedding whose storage it shares."""
    return {row.name: row.tied_to for row in layout.rows if row.tied_to is not None}


@dataclass(frozen=True)
class TurnedTensors:
    """Other tensors in another basis of the stream; a tied head becomes a matrix of its own.

    Attributes:
        whole: what is turned.
        places: name of every turned tensor -> its row, and the block that it is in.
        tied: head -> the embedding that it is made of.
        norms: which norm is read by what.
        basis_DD: Q, in double precision.
        gains: every norm's gain, in double precision.
        sizes_D: every norm's gain afterwards; 1 where there is none.
        offset: what the architecture adds to a norm's weight; gains are with it.
        dtypes: safetensors' names of the types to give tensors in; double precision where None.
    """

    whole: Tensors
    places: Mapping[str, tuple[Row, int | None]]
    tied: Mapping[str, str]
    norms: Norms
    basis_DD: Tensor
    gains: Mapping[str, Tensor]
    sizes_D: Mapping[str, Tensor] = field(default_factory=dict)
    offset: float = 0.0
    dtypes: Mapping[str, str] | None = None

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(name, tensor)`` in the new basis."""
        for name in names:
            row, block = self.places[name]
            dtype = torch.float64 if self.dtypes is None else torch_dtype(self.dtypes[name])
            for _, tensor in self.whole.read([self.tied.get(name, name)]):
                yield name, self._turn(row, block, tensor, dtype)

    def _turn(self, row: Row, block: int | None, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if STREAM not in row.dims:
            return tensor.to(dtype, copy=True)
        if row.role == "norm":
            name = row.name.format(block)
            sizes_D = self.sizes_D.get(name, torch.ones_like(tensor.double()))
            return (sizes_D - self.offset).to(tensor.device, dtype)
        norm = self.norms.before(row).format(block) if reads(row) else None
        x = stream_last(row, tensor)
        turned = self._product(x.reshape(-1, x.shape[-1]), norm, dtype).view(x.shape)
        return turned.movedim(-1, row.dims.index(STREAM)).contiguous()

    def _product(self, x_RD: Tensor, norm: str | None, dtype: torch.dtype) -> Tensor:
        """x diag(g) Q / h, some rows at a time; x Q where there is no norm."""
        basis_DD = self.basis_DD
        if norm is not None:
            basis_DD = self.gains[norm][:, None] * basis_DD
            basis_DD = basis_DD / self.sizes_D[norm] if norm in self.sizes_D else basis_DD
        basis_DD = basis_DD.to(x_RD.device)
        return torch.cat([(part.double() @ basis_DD).to(dtype) for part in x_RD.split(_ROWS)])


def turn(
    checkpoint: Checkpoint, norms: Norms, basis_DD: Tensor, gains: Mapping[str, Tensor]
) -> Checkpoint:
    """The checkpoint in the basis Q = ``basis_DD``: gains are folded in and chosen anew.

    The new ones are the sizes of the columns of what reads each norm.
    """
    tied = tied_heads(checkpoint.layout)
    turned = _untied(checkpoint, tied)
    places = turned.layout.places(turned.shape)
    offset = checkpoint.family.gain_offset
    tensors = TurnedTensors(checkpoint.tensors, places, tied, norms, basis_DD, gains, offset=offset)
    tensors = dataclasses.replace(tensors, sizes_D=_column_sizes(tensors))
    family = dataclasses.replace(checkpoint.family, rescale=partial(_widen, offset))
    return dataclasses.replace(turned, family=family, tensors=tensors, source=checkpoint)


def _untied(checkpoint: Checkpoint, tied: Mapping[str, str]) -> Checkpoint:
    """What would be known of the checkpoint if its head had a matrix of its own."""
    if not tied:
        return checkpoint
    config = copy.deepcopy(checkpoint.config)
    setattr(config, TIED, False)
    dtypes = checkpoint.dtypes
    return dataclasses.replace(
        checkpoint,
        raw={**checkpoint.raw, TIED: False},
        config=config,
        layout=checkpoint.family.layout(config),
        dtypes={**dtypes, **{head: dtypes[name] for head, name in tied.items()}},
    )


def _column_sizes(turned: TurnedTensors) -> dict[str, Tensor]:
    """Root mean square of the columns of what reads each norm, over that of all; some rows do."""
    sums: dict[str, Tensor] = {}
    for name, (row, block) in turned.places.items():
        if not reads(row):
            continue
        norm = turned.norms.before(row).format(block)
        for _, tensor in turned.read([name]):
            found_D = stream_last(row, tensor).flatten(0, -2)[:_ROWS].double().square().sum(0)
            sums[norm] = sums[norm] + found_D if norm in sums else found_D
    return {norm: (sum_D / sum_D.mean()).sqrt().clamp_min(1e-4) for norm, sum_D in sums.items()}


def _widen(offset: float, row: Row, before: Shape, after: Shape) -> Affine | None:
    """Norms that take their mean square over fewer channels: what is cut is all but nothing."""
    if row.role != "norm" or row.dims != (STREAM,) or before["hidden"] == after["hidden"]:
        return None
    scale = math.sqrt(before["hidden"] / after["hidden"])
    return Affine(scale, (scale - 1) * offset, lasting=True)


def write(turned: Checkpoint, directory: Path, shard_bytes: int, progress: Progress) -> Checkpoint:
    """The rotated weights on disk, read back as they are stored."""
    assert isinstance(turned.tensors, TurnedTensors)
    rounded = dataclasses.replace(turned.tensors, dtypes=turned.dtypes)
    check_space(directory, turned.bytes)
    with new_directory(directory) as staging:
        write_json(staging / "config.json", turned.raw)
        write_weights(
            staging,
            turned.sizes,
            lambda names: dict(rounded.read(names)),
            shard_bytes=shard_bytes,
            progress=lambda _, done, total: progress("writing the rotated weights", done, total),
        )
    return dataclasses.replace(turned, tensors=Checkpoint.open(directory).tensors)


def retie(exact: Checkpoint, norm: str, gain_D: Tensor, directory: Path) -> Checkpoint:
    """The rotated model with the source's tied head, the final norm's gain before it."""
    source, file = exact.source, directory / "readout.safetensors"
    assert source is not None, "a rotated model is made of another"
    weight_D = gain_D - source.family.gain_offset
    save_file({norm: weight_D.to(torch_dtype(source.dtypes[norm]))}, file)
    return dataclasses.replace(
        exact,
        raw=source.raw,
        config=source.config,
        layout=source.layout,
        dtypes=source.dtypes,
        tensors=StoredTensors({name: exact.files[name] for name in source.dtypes} | {norm: file}),
    )
