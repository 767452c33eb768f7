"""What a cut leaves of a checkpoint, as a checkpoint whose tensors are cut as they are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from shearling.engine.views.selected import taken
from shearling.files.scratch import scratch
from shearling.files.writer import write_json
from shearling.model.checkpoint import Checkpoint
from shearling.model.loading import load_config
from shearling.model.tensors import Tensors
from shearling.table.families import Family, family_of
from shearling.table.values import Cut, Keep, Selection


@dataclass(frozen=True)
class CutTensors:
    """What a cut leaves of other tensors.

    Attributes:
        whole: what is cut.
        cut: what survives of it.
        family: of the model that is cut; it says what is rescaled.
    """

    whole: Tensors
    cut: Cut
    family: Family

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(name, tensor)`` of the cut, in the order of what is cut."""
        wanted = {s.source: s for s in map(self.cut.by_target.__getitem__, names)}
        for name, tensor in self.whole.read(wanted):
            yield wanted[name].target, self._select(wanted[name], tensor)

    def _select(self, selection: Selection, tensor: Tensor) -> Tensor:
        """What survives of a tensor, with the values that it has among the result's sizes."""
        tensor = taken(tensor, selection)
        rescale = self.family.rescale(selection.row, self.cut.before, self.cut.after)
        return tensor if rescale is None else rescale.apply(tensor)


def cut_view(checkpoint: Checkpoint, keep: Keep | Cut) -> Checkpoint:
    """What ``keep`` leaves of ``checkpoint``.

    Raises:
        ShearlingError: ``keep`` is not possible, or the architecture cannot express what it leaves.
    """
    cut = checkpoint.layout.cut(keep, checkpoint.shape)
    checkpoint.family.check(checkpoint.config, cut.after)
    raw = checkpoint.family.write(checkpoint.raw, checkpoint.config, cut.after, cut.layers)
    if "vocab" in cut.keep.model:
        from shearling.model.token_ids import renumber_ids

        raw = renumber_ids(raw, cut.keep.model["vocab"])
    with scratch() as directory:
        write_json(directory / "config.json", raw)
        config = load_config(directory)
    family = family_of(raw["model_type"], checkpoint.name)
    return Checkpoint(
        path=checkpoint.path,
        raw=raw,
        config=config,
        family=family,
        layout=family.layout(config),
        shape=cut.after,
        dtypes={s.target: checkpoint.dtypes[s.source] for s in cut.selections},
        tensors=CutTensors(checkpoint.tensors, cut, checkpoint.family),
        source=checkpoint,
    )
