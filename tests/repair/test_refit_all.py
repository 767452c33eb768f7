"""Several cuts repaired beside one walk of the source: each as if it were the only one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import shearling.engine.place
import shearling.engine.states
from places import place
from shearling.engine.states import States
from shearling.engine.stream import BlockStream
from shearling.engine.walk import Step, Text, forward
from shearling.model.checkpoint import Checkpoint
from shearling.repair import source_walk
from shearling.repair.cut_walk import CutToRepair, CutWalk
from shearling.repair.refit import FURTHER_WIDTHS, refit, refit_all
from shearling.repair.result import Repair
from shearling.table.values import Keep
from tiny_cuts import random_keep, sizes_of

Models = Callable[[str], Path]
# Of five blocks: gaps that begin and end at different places, one at both ends.
GAPS = ((0, 2, 3, 4), (0, 1, 4), (1, 3))
SOME = [("llama", False), ("gemma2", True), ("olmo2", True), ("qwen3_moe", True)]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shearling.engine.place, "BATCH_TOKENS", 3 * 11)


def drawn() -> torch.Tensor:
    return torch.randint(3, 101, (10, 11), generator=torch.Generator().manual_seed(5))


def cuts_of(checkpoint: Checkpoint, variant: str) -> list[Keep]:
    """A cut with each gap; every other one of fewer neurons as well."""
    axes = tuple(axis for axis in ("mlp",) if axis in checkpoint.shape)
    narrow = random_keep(checkpoint, sizes_of(variant, axes))
    cuts = []
    for number, layers in enumerate(GAPS):
        blocks = narrow.blocks if number % 2 == 0 else {}
        kept = {axis: tuple(rows[one] for one in layers) for axis, rows in blocks.items()}
        cuts.append(Keep({"layers": layers}, kept))
    return cuts


def assert_same(one: Repair, other: Repair) -> None:
    assert one.steps == other.steps
    assert (one.divergence, one.warnings, one.tokens) == (
        other.divergence, other.warnings, other.tokens,
    )  # fmt: skip
    assert one.replaced.keys() == other.replaced.keys()
    for name, read in one.replaced.items():
        assert torch.equal(read(), other.replaced[name]()), name


@pytest.mark.parametrize(("variant", "resident"), SOME)
def test_each_is_what_it_is_alone(
    models: Models, variant: str, resident: bool, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(models(variant))
    cuts = cuts_of(checkpoint, variant)
    stream = BlockStream(checkpoint, place(resident))
    wanted = []
    for number, keep in enumerate(cuts):
        (tmp_path / f"{number}").mkdir()
        wanted.append(CutToRepair(keep, tmp_path / f"{number}", final_norm=number == 1))
    together = refit_all(stream, wanted, drawn(), windows=5)
    for number, (keep, repair) in enumerate(zip(cuts, together, strict=True)):
        alone = tmp_path / f"alone{number}"
        alone.mkdir()
        one = refit(stream, keep, drawn(), alone, windows=5, final_norm=number == 1)
        assert repair.steps
        assert_same(repair, one)


def test_the_source_is_walked_once_and_little_is_kept(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    walked: list[range] = []
    most = 0

    def noting(text: Text, *rest: Any, blocks: range, **options: Any) -> Iterator[Step]:
        walked.append(blocks)
        yield from forward(text, *rest, blocks=blocks, **options)

    put = States.put

    def counting(self: States, *given: Any) -> None:
        nonlocal most
        put(self, *given)
        held = {key for key, batch in self._held if batch == 0}
        most = max(most, len(held))

    monkeypatch.setattr(source_walk, "forward", noting)
    monkeypatch.setattr(States, "put", counting)
    kept = []
    for count in (1, 3):
        walked.clear()
        most = 0
        cuts = [CutToRepair(Keep({"layers": layers}), tmp_path) for layers in GAPS[:count]]
        told: list[Any] = []

        def tell(*one: Any, told: list[Any] = told) -> None:
            told.append(one)

        refit_all(BlockStream(checkpoint, place()), cuts, drawn(), progress=tell)
        assert walked == [range(block, block + 1) for block in range(5)]
        total = sum(len(layers) for layers in GAPS[:count])
        repairing = [one for one in told if one[0] == "repairing the cut"]
        assert repairing == [("repairing the cut", n, total) for n in range(1, total + 1)]
        kept.append(most)
    assert kept[1] - kept[0] <= 2 * FURTHER_WIDTHS  # of the streams' width all of them


@pytest.mark.parametrize("variant", ["llama", "gemma2", "gpt_neox", "opt-projected", "qwen3_5"])
def test_no_branch_is_run_twice_and_nothing_differs(
    models: Models, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = BlockStream(Checkpoint.open(models(variant)), place())
    keep, entered = Keep({"layers": (0, 2, 3)}), 0
    run_from = BlockStream.run_from

    def counting(self: BlockStream, *given: Any) -> None:
        nonlocal entered
        entered += 1
        run_from(self, *given)

    monkeypatch.setattr(BlockStream, "run_from", counting)
    (tmp_path / "entered").mkdir()
    quick = refit(stream, keep, drawn(), tmp_path / "entered", final_norm=False)
    assert entered == 3 * 4  # every batch of every block that stays
    monkeypatch.setattr(CutWalk, "_enters", lambda *_: False)
    (tmp_path / "whole").mkdir()
    assert_same(quick, refit(stream, keep, drawn(), tmp_path / "whole", final_norm=False))
    assert entered == 3 * 4


def test_a_block_that_is_not_entered_so_is_run_whole(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = BlockStream(Checkpoint.open(models("llama")), place())
    keep = Keep({"layers": (0, 2, 3)})
    (tmp_path / "as it is").mkdir()
    expected = refit(stream, keep, drawn(), tmp_path / "as it is", final_norm=False)
    run_from = BlockStream.run_from

    def wrong(
        self: BlockStream, block: Any, call: Any, h_BSD: torch.Tensor, entrance: Any,
        x_BSK: torch.Tensor,
    ) -> None:  # fmt: skip
        run_from(self, block, call, h_BSD, entrance, x_BSK + 1e-6)

    monkeypatch.setattr(BlockStream, "run_from", wrong)
    (tmp_path / "wrong").mkdir()
    assert_same(expected, refit(stream, keep, drawn(), tmp_path / "wrong", final_norm=False))
