"""What is asked of experts: settled, ignored with a word, or refused, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.prune import Repairs
from shearling.pruning.settle import settle_experts
from shearling.repair.experts import ExpertOptions
from shearling.table.values import Shape

Models = Callable[[str], Path]
BOTH = Repairs(router=True, merge_experts=True)


def test_what_is_asked_of_experts(models: Models) -> None:
    source, told = Checkpoint.open(models("mixtral")), []
    fewer = source.shape.with_(experts=3)

    def settled(repairs: Repairs, after: Shape, *, repaired: bool = True) -> ExpertOptions:
        told.clear()
        return settle_experts(repairs, source, after, repaired=repaired, notify=told.append)

    assert settled(Repairs(), fewer) == ExpertOptions(router=False, merge=False)
    assert settled(BOTH, fewer) == ExpertOptions(router=True, merge=True)
    assert told == []
    assert settled(BOTH, source.shape) == ExpertOptions()
    assert told == ["--merge-experts, --router ignored: no experts go."]
    assert settled(Repairs(router=True), fewer, repaired=False) == ExpertOptions()
    assert told == ["--router ignored: nothing is repaired."]
    with pytest.raises(ShearlingError, match="give --calibration FILE"):
        settled(BOTH, fewer, repaired=False)
    with pytest.raises(ShearlingError, match="expert_mlp shrinks from 20 to 8"):
        settled(BOTH, fewer.with_(expert_mlp=8))


def test_a_model_without_experts_is_told_so(models: Models) -> None:
    source, told = Checkpoint.open(models("llama")), []
    after = source.shape.with_(mlp=8)
    options = settle_experts(BOTH, source, after, repaired=True, notify=told.append)
    assert options == ExpertOptions()
    assert told == ["--merge-experts, --router ignored: no experts go."]
