"""Models of a shape with random weights: they cost what a cut of that shape will cost.

Which blocks stay does not matter for time but for their kinds: those of a run in the middle go, as
most criteria have it, and one of each kind stays.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from shearling.files.reading import read_json
from shearling.files.writer import check_space, write_json, write_weights
from shearling.model.checkpoint import Checkpoint
from shearling.model.dtypes import torch_dtype
from shearling.model.remote_code import without_code
from shearling.model.side_files import copy_side_files
from shearling.model.token_ids import named_ids, renumber_ids
from shearling.table.kinds import one_by_one
from shearling.table.values import Indices, Shape

SHARD_BYTES = 10**9
DEVIATION = 0.02  # as models are initialised
GENERATION = "generation_config.json"


def write_random(source: Checkpoint, shape: Shape, directory: Path) -> None:
    """Write a model of ``shape`` into a new directory, in the types that the source is stored in.

    Args:
        source: whose architecture, configuration and tokenizer it has.
        shape: sizes that the architecture can express.
        directory: where; it is not there yet.

    Raises:
        ShearlingError: the disk is too small.
    """
    blocks = middle_removed(source, shape["layers"])
    layout = source.layout.keeping(blocks)
    types = {
        row.name: torch_dtype(source.dtypes[name])
        for name, (row, _) in source.layout.places(source.shape).items()
        if name in source.dtypes
    }
    sizes = layout.tensors(shape)
    kinds = {
        name: types[row.name] for name, (row, _) in layout.places(shape).items() if not row.bare
    }
    stored = {name: math.prod(sizes[name]) * kind.itemsize for name, kind in kinds.items()}
    check_space(directory / "config.json", sum(stored.values()))
    directory.mkdir(parents=True)
    _write_configuration(source, shape, blocks, directory)
    generator = torch.Generator().manual_seed(0)

    def drawn(names: list[str]) -> dict[str, Tensor]:
        return {
            name: torch.empty(sizes[name])
            .normal_(0, DEVIATION, generator=generator)
            .to(kinds[name])
            for name in names
        }

    write_weights(directory, stored, drawn, shard_bytes=SHARD_BYTES)


def middle_removed(source: Checkpoint, layers: int) -> Indices:
    """The blocks that stay when a run in the middle goes, one of each kind among them."""
    depth = source.shape["layers"]
    middle = (depth - 1) / 2
    nearest = sorted(range(depth), key=lambda block: (abs(block - middle), block))
    gone = set(one_by_one(source.layout.kinds, nearest)[: depth - layers])
    return tuple(block for block in range(depth) if block not in gone)


def _write_configuration(
    source: Checkpoint, shape: Shape, blocks: Indices, directory: Path
) -> None:
    config = source.family.write(source.raw, source.config, shape, blocks)
    copy_side_files(source.path, directory)
    if shape["vocab"] < source.shape["vocab"]:  # ids that a file names have to have a row
        generation = read_json(directory / GENERATION) if (directory / GENERATION).exists() else {}
        named = {i for i in named_ids(config) | named_ids(generation) if i < source.shape["vocab"]}
        others = (i for i in range(source.shape["vocab"]) if i not in named)
        rest = [next(others) for _ in range(shape["vocab"] - len(named))]
        kept = tuple(sorted([*named, *rest]))
        config = renumber_ids(config, kept)
        if generation:
            write_json(directory / GENERATION, renumber_ids(generation, kept))
    write_json(directory / "config.json", without_code(config))
