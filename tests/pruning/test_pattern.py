"""Cuts that leave blocks of the kinds that llama.cpp counts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.pattern import Pattern, pattern_of
from shearling.pruning.prune import Criteria, Running, Size, prune
from shearling.scoring.scores import Scores

DEPTH = 8
SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 12, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4,
    "max_position_embeddings": 32, "num_hidden_layers": DEPTH,
}  # fmt: skip


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A Gemma 3 of eight blocks, of which the sixth attends to everything."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("gemma") / "gemma"
    AutoModelForCausalLM.from_config(Gemma3TextConfig(**SIZES)).save_pretrained(path)
    return Checkpoint.open(path)


@pytest.fixture(scope="module")
def pattern(gemma: Checkpoint) -> Pattern:
    found = pattern_of(gemma.family, gemma.config)
    assert found is not None
    return found


def kinds(path: Path) -> list[str]:
    return json.loads((path / "config.json").read_text())["layer_types"]


def counted(depth: int) -> list[str]:
    """As llama.cpp has it: every sixth attends to everything."""
    return ["full_attention" if n % 6 == 5 else "sliding_attention" for n in range(depth)]


@pytest.mark.parametrize("removed", range(1, DEPTH))
def test_removals_are_all_that_keep_the_pattern(pattern: Pattern, removed: int) -> None:
    assert list(pattern.kinds) == counted(DEPTH)
    ways = [
        gone
        for gone in itertools.combinations(range(DEPTH), removed)
        if [kind for block, kind in enumerate(counted(DEPTH)) if block not in gone]
        == counted(DEPTH - removed)
    ]
    assert set(pattern.removals(removed, limit=10**6)) == set(ways)
    costs = [3.0, 1.0, 4.0, 1.5, 5.0, 9.0, 2.0, 6.0]
    cheapest = pattern.cheapest(costs, DEPTH - removed)
    if not ways:
        assert cheapest is None
        return
    assert cheapest is not None
    gone = set(range(DEPTH)) - set(cheapest)
    assert tuple(sorted(gone)) in ways
    assert sum(costs[block] for block in gone) == min(sum(costs[b] for b in way) for way in ways)


def cut(gemma: Checkpoint, output: Path, size: Size, **criteria: Any) -> list[str]:
    """Cut, and give what was said."""
    told: list[str] = []
    prune(
        gemma, output, size, criteria=Criteria(**criteria) if criteria else None,
        running=Running(notify=told.append),
    )  # fmt: skip
    return told


def test_keep_pattern_cuts_the_cheapest_that_keeps_it(gemma: Checkpoint, tmp_path: Path) -> None:
    # The first two cost least, and to remove them would leave the sixth as the fourth.
    values = (0.0, 0.1, 5.0, 5.0, 5.0, 5.0, 1.0, 2.0)
    scores = Scores("by hand", "layers", (values,))
    told = cut(gemma, tmp_path / "kept", Size(layers=6), scores=scores, keep_pattern=True)
    assert kinds(tmp_path / "kept") == counted(6)
    assert not any("pattern" in line for line in told)
    said = json.loads((tmp_path / "kept" / "shearling.json").read_text())
    assert said["options"]["removed"] == [6, 7]

    told = cut(gemma, tmp_path / "broken", Size(layers=6), scores=scores)
    assert kinds(tmp_path / "broken") != counted(6)
    assert sum("`shearling export` will refuse" in line for line in told) == 1
    assert any("--keep-pattern" in line for line in told)


def test_a_removal_that_breaks_the_pattern_is_said_or_refused(
    gemma: Checkpoint, tmp_path: Path
) -> None:
    told = cut(gemma, tmp_path / "a", Size(remove=(1, 2)))
    assert any("llama.cpp counts" in line for line in told)
    assert not any("pattern" in line for line in cut(gemma, tmp_path / "b", Size(remove=(6, 7))))
    with pytest.raises(ShearlingError, match="remove 6,7 instead"):
        cut(gemma, tmp_path / "c", Size(remove=(1, 2)), keep_pattern=True)
    assert not (tmp_path / "c").exists()


def test_where_there_is_nothing_to_keep(
    gemma: Checkpoint, pattern: Pattern, tmp_path: Path
) -> None:
    told = cut(gemma, tmp_path / "a", Size(shape="mlp=8"), by="random", keep_pattern=True)
    assert any("--keep-pattern ignored: all blocks stay" in line for line in told)
    full = Pattern(pattern.facts, ("full_attention",) * 8, 8)
    assert (full.removals(2), full.depths()) == ([], [])
