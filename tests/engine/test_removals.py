"""Many removals in one walk give what one whole stock model for each gives."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import naive
import shearling.engine.place
from places import place
from shearling.engine.removals import Removed, removal_nll
from shearling.engine.states import States
from shearling.engine.stream import BlockStream
from shearling.model.checkpoint import Checkpoint

Models = Callable[[str], Path]
DEPTH = 5
NONE: Removed = frozenset()
SINGLES = [NONE, *(frozenset({block}) for block in range(DEPTH))]
# Sets that share beginnings, that diverge late, that skip everything, and one named twice.
AWKWARD = [
    frozenset({1, 3}),
    NONE,
    frozenset({1, 2}),
    frozenset({0, 1, 2, 3, 4}),
    frozenset({1, 3}),
    frozenset({4}),
    frozenset({0, 4}),
    frozenset({1, 2, 4}),
]
removal_lists = st.lists(st.frozensets(st.integers(0, DEPTH - 1)), min_size=1, max_size=7)


def tokens(n: int = 3, length: int = 11) -> Tensor:
    return torch.randint(3, 101, (n, length), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    path = tmp_path / "scratch"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    return path


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of two sequences, the last of one."""
    monkeypatch.setattr(shearling.engine.place, "BATCH_TOKENS", 22)


def run(path: Path, removals: Sequence[Removed], resident: bool) -> list[float]:
    stream = BlockStream(Checkpoint.open(path), place(resident))
    return removal_nll(stream, tokens(), removals)


@cache
def expected(path: Path, removed: Removed) -> float:
    return naive.mean_nll(path, tokens(), removed)


@pytest.mark.usefixtures("small_batches", "scratch")
def test_equals_whole_models(models: Models, variant: str) -> None:
    removals = [*SINGLES, *AWKWARD]
    streamed = run(models(variant), removals, resident=False)
    assert streamed == pytest.approx([expected(models(variant), r) for r in removals], rel=1e-5)
    assert run(models(variant), removals, resident=True) == streamed


@pytest.mark.parametrize("variant", ["llama", "gemma3"])
@settings(max_examples=25, deadline=None)
@given(removals=removal_lists, batch=st.integers(1, 4), resident=st.booleans())
def test_any_removals_in_any_batches(
    models: Models, variant: str, removals: list[Removed], batch: int, resident: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shearling.engine.place, "BATCH_TOKENS", 11 * batch)
        found = run(models(variant), removals, resident)
    assert found == pytest.approx([expected(models(variant), r) for r in removals], rel=1e-5)


def test_removals_differ(models: Models, variant: str) -> None:
    """Else equality with the reference would prove little."""
    distinct = {round(expected(models(variant), removed), 4) for removed in SINGLES}
    assert len(distinct) == len(SINGLES)


@pytest.mark.usefixtures("small_batches", "scratch")
def test_each_block_is_read_once(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = BlockStream(Checkpoint.open(models("llama")), place(False))
    loaded = []
    read = stream._weights._read
    monkeypatch.setattr(
        stream._weights, "_read", lambda index, device: loaded.append(index) or read(index, device)
    )
    removal_nll(stream, tokens(), [*SINGLES, *AWKWARD])
    assert loaded == list(range(DEPTH))


@pytest.mark.usefixtures("small_batches")
def test_no_state_is_computed_twice(models: Models) -> None:
    stream = BlockStream(Checkpoint.open(models("llama")), place(True))
    runs = [0] * (DEPTH + 1)

    def count(index: int) -> Callable[..., None]:
        def hook(_module: object, inputs: tuple[Tensor], _output: object) -> None:
            runs[index] += inputs[0].shape[1] > 1  # beginning puts one position through the head

        return hook

    for index, module in enumerate([*stream.shells, stream._model.get_submodule("lm_head")]):
        module.register_forward_hook(count(index))
    removal_nll(stream, tokens(), [*SINGLES, *SINGLES])
    # Before block b only the b single removals of earlier blocks and the intact model differ.
    assert runs == [2 * (block + 1) for block in range(DEPTH)] + [2 * len(SINGLES)]


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("resident", [True, False])
def test_scratch_files_go(
    models: Models, scratch: Path, resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []
    put = States.put

    def watched(self: States, key: Removed, batch: int, state: Tensor) -> None:
        put(self, key, batch, state)
        held.append(len(list(scratch.rglob("*.states"))))

    monkeypatch.setattr(States, "put", watched)
    for removals in (SINGLES, AWKWARD):
        held.clear()
        run(models("llama"), removals, resident)
        # One file for every distinct model and batch, however deep the model.
        assert max(held) == (0 if resident else len(set(removals)) * 2)
        assert list(scratch.iterdir()) == []


def test_scratch_files_go_after_an_error(models: Models, scratch: Path) -> None:
    stream = BlockStream(Checkpoint.open(models("llama")), place(False))

    def stop(stage: str, done: float, total: float, /) -> None:
        assert list(scratch.rglob("*.states"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        removal_nll(stream, tokens(), SINGLES, progress=stop)
    assert list(scratch.iterdir()) == []
    assert all(t.is_meta for shell in stream.shells for t in shell.parameters())


@pytest.mark.parametrize("removals", [SINGLES, AWKWARD, [NONE], [frozenset(range(DEPTH))]])
def test_progress_ends_at_its_total(models: Models, removals: list[Removed]) -> None:
    heard: list[tuple[str, float, float]] = []
    stream = BlockStream(Checkpoint.open(models("llama")), place(True))
    removal_nll(
        stream, tokens(), removals, progress=lambda *told: heard.append(told), stage="walking"
    )
    total = heard[-1][2]
    assert heard == [("walking", done, total) for done in range(1, int(total) + 1)]
    if removals is SINGLES:
        assert total == (1 + 2 + 3 + 4 + 5) + 6


def test_a_state_is_replaced_and_moved(tmp_path: Path) -> None:
    states = States(replace(place(False), scratch=tmp_path))
    first, second = torch.randn(2, 3, 4).bfloat16(), torch.randn(3, 2, 4).transpose(0, 1)
    states.put(NONE, 0, first)
    assert torch.equal(states.get(NONE, 0), first)
    states.put(NONE, 0, second)
    assert torch.equal(states.get(NONE, 0), second)
    states.move(NONE, frozenset({2}), 0)
    assert torch.equal(states.get(frozenset({2}), 0), second)
    (scratch,) = tmp_path.iterdir()
    assert len(list(scratch.iterdir())) == 1
    with pytest.raises(KeyError):
        states.get(NONE, 0)
