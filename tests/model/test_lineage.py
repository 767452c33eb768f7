"""Which blocks stand for which, over several cuts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shearling.model.checkpoint import Checkpoint
from shearling.model.lineage import blocks_in, final_weights
from shearling.pruning.cut import cut
from shearling.table.values import Keep


def test_blocks_over_two_cuts(models: Callable[[str], Path], tmp_path: Path) -> None:
    source = Checkpoint.open(models("llama"))
    once = cut(source, Keep({"layers": (0, 2, 3, 4)}), tmp_path / "once")
    narrow = cut(once, Keep({"hidden": tuple(range(30))}), tmp_path / "narrow")
    twice = cut(narrow, Keep({"layers": (0, 2, 3)}), tmp_path / "twice")
    assert blocks_in(twice, source) == (0, 3, 4)
    assert blocks_in(twice, once) == (0, 2, 3)
    assert blocks_in(twice, twice) == (0, 1, 2)
    assert blocks_in(source, twice) is None
    assert final_weights(twice) is None
