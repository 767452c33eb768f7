"""A GPU gives what the processor gives: every family, its blocks on the device or pinned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shearling.engine.place import Place
from shearling.engine.removals import removal_nll
from shearling.engine.stream import BlockStream
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.cut import cut
from shearling.repair.refit import refit
from shearling.scoring.score_experts import score_experts
from shearling.scoring.score_units import score_units
from shearling.table.values import Keep
from tiny_models import LEADING, MIXTURES

Models = Callable[[str], Path]


def figures(checkpoint: Checkpoint, place: Place, folder: Path) -> dict[str, Any]:
    """Losses without a block, scores of every width, a repair, and the proof of the cut."""
    generator = torch.Generator().manual_seed(1)
    ids_NS = torch.randint(3, 101, (16, 24), generator=generator)
    stream, shape = BlockStream(checkpoint, place), checkpoint.shape
    last = shape["layers"] - 1
    losses = removal_nll(stream, ids_NS, [frozenset(), frozenset({last})])
    if "experts" in shape:
        scores = score_experts(stream, "reroute", ids_NS, ["experts", "expert_mlp"])
        kept = tuple(range(shape["experts"] - shape.get("expert_groups", 1)))
        if "expert_groups" in shape:
            each = shape["experts"] // shape["expert_groups"]
            kept = tuple(e for e in range(shape["experts"]) if e % each != each - 1)
        keep = Keep({}, {"experts": (kept,) * shape["layers"]})
    else:
        scores = score_units(stream, "fisher-energy", ids_NS, ["mlp"])
        kept = tuple(range(shape["mlp"] - 9))
        keep = Keep({"layers": tuple(range(last))}, {"mlp": (kept,) * last})
    folder.mkdir()
    solved = refit(stream, keep, ids_NS, folder)
    result = cut(
        checkpoint, keep, folder / "cut", replaced=solved.replaced, place=place
    )  # proves it, or raises
    return {
        "losses": losses,
        **{axis: [x for row in s.rows for x in row] for axis, s in scores.items()},
        "errors": [step.error_after for step in solved.steps],
        "weights": torch.cat([t.float().flatten() for _, t in result.read(result.sizes)]).tolist(),
    }


@pytest.mark.gpu
@pytest.mark.parametrize("variant", [*LEADING, *MIXTURES])
def test_a_gpu_gives_what_the_processor_gives(models: Models, variant: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(models(variant))
    expected = figures(checkpoint, Place.cpu(), tmp_path / "cpu")
    resident = Place(torch.device("cuda", 0), states="device")
    places = {"device": resident, "pinned": replace(resident, weights="pinned", states="host")}
    for name, place in places.items():
        computed = figures(checkpoint, place, tmp_path / name)
        assert computed.keys() == expected.keys()
        for figure, values in expected.items():
            got, want = torch.tensor(computed[figure]), torch.tensor(values)
            assert float((got - want).norm() / want.norm()) < 2e-3, (name, figure)
