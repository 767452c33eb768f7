"""Where a model's weights come from: the files on disk, or what is made of others as they are read.

What is made of others wraps them, and wrappers can be stacked: a cut of a folded model, a masked
rotated one. Put into a checkpoint by ``dataclasses.replace``, they give a model that exists only
as it is read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from safetensors import safe_open
from torch import Tensor

from shearling.model.sanity import check_numbers
from shearling.table.families import Home


class Tensors(Protocol):
    """Weights by name."""

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(name, tensor)`` for every name once, in an order that suits the source.

        A tensor may be a view of a mapped file, to be copied by whoever keeps or changes it.
        """
        ...


@dataclass(frozen=True)
class StoredTensors:
    """Weights in safetensors files.

    Attributes:
        files: tensor name -> shard that holds it.
        stored: tensor name -> its name there, where that is another.
        parts: tensor name -> which part it is of what is stored, where it is one.
        turned: names there of what is stored with its last two dimensions in the other order.
    """

    files: Mapping[str, Path]
    stored: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, Home] = field(default_factory=dict)
    turned: Collection[str] = ()
    _checked: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(name, tensor)``, each shard opened once, in the order of the shards.

        Tensors are views of the mapped file, and their memory goes when they do, provided the
        iteration has moved to its end. The first time, each is looked through for numbers that
        are none; after that, reading costs nothing until it is touched.

        Raises:
            ShearlingError: a tensor holds NaN or infinity, or a shard is damaged.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        for file, wanted in by_file.items():
            with safe_open(file, "pt") as shard:
                for name in wanted:
                    stored = self.stored.get(name, name)
                    tensor = shard.get_tensor(stored)
                    if stored in self.turned:
                        tensor = tensor.mT
                    if name in self.parts:
                        tensor = self.parts[name].of(tensor).contiguous()
                    if name not in self._checked:
                        check_numbers(name, tensor, file)
                        self._checked.add(name)
                    yield name, tensor
