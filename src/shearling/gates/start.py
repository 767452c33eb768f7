"""One-shot scores as a beginning: gates start in their order.

Sheared LLaMA starts with every gate open and lets training find out which units matter. What a
few walks through the model already tell (shearling.scoring) is given to the gates here as
the order in which they start.

Shapes: N sequences of S tokens; R rows of U units.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from shearling.data.bos import TokenWindows
from shearling.data.store import Store
from shearling.engine.place import Place
from shearling.engine.stream import BlockStream
from shearling.files.progress import Progress, silent
from shearling.gates.bank import GateBank, ranks
from shearling.model.checkpoint import Checkpoint
from shearling.scoring.registry import default_for
from shearling.scoring.score import score_tokens
from shearling.scoring.score_units import score_units
from shearling.scoring.scores import Scores
from shearling.table.values import Shape
from shearling.train.mixture import Mixture

MIDDLE = 0.0  # log alpha between the units that would stay and those that would go


def windows(
    store: Store, weights: Mapping[str, float], samples: int, length: int, seed: int
) -> TokenWindows:
    """Tokens (samples, length) of the training part, domains mixed as ``weights`` say."""
    sizes = {domain: len(store.sequences(domain)) for domain in store.domains}
    rows = Mixture(sizes, seed=seed, batch=samples).next(weights)
    ids_NS = torch.cat([store.sequences(domain)[[row]][0][:, :length] for domain, row in rows])
    return TokenWindows(ids_NS, store.bos)


def score(
    checkpoint: Checkpoint,
    after: Shape,
    ids_NS: Tensor,
    *,
    place: Place | None = None,
    progress: Progress = silent,
) -> tuple[Scores | None, dict[str, Scores]]:
    """Scores of the blocks, if some are to go, and of the units of every width that shrinks."""
    before = checkpoint.shape
    blocks = BlockStream(checkpoint, place or Place.best(checkpoint))
    remove = before["layers"] - after["layers"]
    of_blocks = None
    if remove:
        by = default_for("blocks", checkpoint, repaired=True)
        of_blocks = score_tokens(blocks, by, ids_NS, remove=remove, progress=progress)
    axes = [
        axis.name
        for axis in checkpoint.layout.axes
        if axis.name not in ("layers", "vocab") and after[axis.name] < before[axis.name]
    ]
    by = default_for("units", checkpoint, repaired=True)
    of_units = score_units(blocks, by, ids_NS, axes, progress=progress) if axes else {}
    return of_blocks, of_units


def set_out(
    bank: GateBank, blocks: Scores | None, units: Mapping[str, Scores], spread: float
) -> None:
    """Start the gates in the order of scores, those that would stay above the middle."""
    with torch.no_grad():
        for axis, rows in bank.rows.items():
            if axis == "layers":
                assert blocks is not None, "blocks are to go, and were scored"
                values_RU = torch.tensor([_ranks(blocks)])
            else:
                values_RU = torch.tensor(units[axis].rows).reshape(rows.rows, rows.units)
            place_RU = places(values_RU, rows.target)
            bank.log_alpha[axis].copy_(MIDDLE + spread / 2 * place_RU)


def places(scores_RU: Tensor, target: int) -> Tensor:
    """Where units stand by rank: the best of a row at 1, the worst at -1, 0 between stay and go."""
    rank_RU, units = ranks(scores_RU), scores_RU.shape[1]
    return torch.where(
        rank_RU < target, (target - rank_RU) / target, (target - rank_RU - 1) / (units - target)
    )


def _ranks(blocks: Scores) -> list[float]:
    """Numbers in the order of removal; protected blocks above all."""
    order = blocks.order
    place = {block: float(number) for number, block in enumerate(order)}
    return [place.get(block, float(len(order))) for block in range(len(blocks.values))]
