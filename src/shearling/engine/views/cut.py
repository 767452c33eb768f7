"""What a cut leaves of a checkpoint, as a checkpoint whose tensors are cut as they are read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shearling.files.writer import write_json
from shearling.model.checkpoint import Checkpoint
from shearling.model.loading import load_config
from shearling.table.axes import Keep, Selection, Shape
from shearling.table.families import family_of


@dataclass(frozen=True)
class CutView(Checkpoint):
    """A cut that exists in memory alone; runs wherever a checkpoint on disk would.

    Attributes:
        source: what is cut.
        selections: name in the cut -> where it comes from and what of it survives.
    """

    source: Checkpoint
    selections: Mapping[str, Selection]

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(name, tensor)`` of the cut, in the order of the source's shards."""
        wanted = {self.selections[name].source: self.selections[name] for name in names}
        for name, tensor in self.source.read(wanted):
            yield wanted[name].target, select(self.source, self.shape, tensor, wanted[name])


def cut_view(checkpoint: Checkpoint, keep: Keep) -> CutView:
    """What ``keep`` leaves of ``checkpoint``.

    Raises:
        ShearlingError: ``keep`` is not possible, or the architecture cannot express what it leaves.
    """
    after = checkpoint.layout.shape_after(keep, checkpoint.shape)
    checkpoint.family.check(checkpoint.config, after)
    selections = {s.target: s for s in checkpoint.layout.select(keep, checkpoint.shape)}
    layers = keep.model.get("layers", tuple(range(checkpoint.shape["layers"])))
    raw = checkpoint.family.write(checkpoint.raw, checkpoint.config, after, layers)
    if "vocab" in keep.model:
        from shearling.model.token_ids import renumber_ids

        raw = renumber_ids(raw, keep.model["vocab"])
    with tempfile.TemporaryDirectory(prefix="shearling-") as directory:
        write_json(Path(directory) / "config.json", raw)
        config = load_config(Path(directory))
    family = family_of(raw["model_type"], checkpoint.name)
    return CutView(
        path=checkpoint.path,
        raw=raw,
        config=config,
        family=family,
        layout=family.layout(config),
        shape=after,
        files={name: checkpoint.files[s.source] for name, s in selections.items()},
        dtypes={name: checkpoint.dtypes[s.source] for name, s in selections.items()},
        source=checkpoint,
        selections=selections,
    )


def select(checkpoint: Checkpoint, after: Shape, tensor: Tensor, selection: Selection) -> Tensor:
    """What survives of a source's tensor, with the values that it has among ``after``'s sizes."""
    for dim, indices in enumerate(selection.indices):
        if indices is not None:
            tensor = tensor.index_select(dim, torch.tensor(indices))
    rescale = checkpoint.family.rescale(selection.row, checkpoint.shape, after)
    return tensor if rescale is None else rescale.apply(tensor)
