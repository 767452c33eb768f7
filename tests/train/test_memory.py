"""What fits in a GPU's memory: counted beforehand, and held against what autograd keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import naive
from shearling import cli
from shearling.data.store import Store
from shearling.engine.ranks import Ranks
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.train import adapters, memory, parallel, setup
from shearling.train.device import Numbers, described
from shearling.train.memory import (
    CONTEXT_BYTES,
    SHARE,
    MemoryBudget,
    adapter_parameters,
    fit,
    free_on_gpu,
    standing,
    token_bytes,
)
from shearling.train.options import Options
from shearling.train.setup import Training, planned

FLOATS = Numbers(torch.float32, torch.float32)
HALVES = Numbers(torch.bfloat16, torch.float32)
GB = 10**9


def options(**changed: Any) -> Options:
    return Options.model_validate({"tokens": 10**6, "batch": 8} | changed)


def kept_bytes(model: Checkpoint, tokens: int, numbers: Numbers) -> float:
    """Bytes a token of what autograd keeps of the blocks of a stock model, each storage once."""
    stock = naive.stock(model.path).train()
    weights = {one.untyped_storage().data_ptr() for one in stock.parameters()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    ids_BS = torch.arange(tokens)[None] % model.shape["vocab"]
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=numbers.autocast),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        stock.model(ids_BS, use_cache=False)
    sizes = [t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights]
    return sum(sizes) / tokens


@pytest.mark.parametrize("numbers", [FLOATS, HALVES])
def test_no_less_is_counted_than_autograd_keeps(model: Checkpoint, numbers: Numbers) -> None:
    """Of two lengths, so that what does not grow with them falls out."""
    short, long = kept_bytes(model, 24, numbers), kept_bytes(model, 48, numbers)
    each = (48 * long - 24 * short) / 24
    counted = token_bytes(model, numbers, checkpointing=False)
    assert 0.9 * each <= counted <= 3 * each
    anew = token_bytes(model, numbers, checkpointing=True)
    assert anew < counted
    assert anew >= model.shape["layers"] * model.shape["hidden"] * 4


def budget(free: int | None, **changed: Any) -> MemoryBudget:
    return replace(MemoryBudget(free, 2048, 8, 1, HALVES), **changed)


def test_as_many_sequences_as_there_is_room_for(model: Checkpoint) -> None:
    each = 2048 * token_bytes(model, HALVES, checkpointing=False)
    for rows in (1, 2, 4, 8):
        free = int((standing(model, options(), budget(0)) + rows * each) / SHARE) + 10
        fitting = fit(model, options(), budget(free))
        assert fitting.micro <= rows
        used = standing(model, options(), budget(free)) + fitting.micro * each
        assert fitting.checkpointing or used <= SHARE * free
    assert fit(model, options(micro=3), budget(100 * GB)).micro == 3
    assert fit(model, options(), budget(100 * GB)).micro == 8


def test_what_is_too_large_is_refused_with_what_would_do(model: Checkpoint) -> None:
    with pytest.raises(ShearlingError, match=r"1\.0 GB are free .* use optimizer=adamw8bit"):
        fit(model, options(), budget(GB))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A GPU that is not there, and its free bytes."""
    free = {"bytes": 80 * GB}
    monkeypatch.setattr(
        setup, "free_on_gpu", lambda device, allowed: min(free["bytes"], allowed or 10**15)
    )
    return free


def test_a_card_is_asked_before_anything_is_loaded(
    model: Checkpoint, teacher: Checkpoint, store: Store, card: dict[str, int], monkeypatch: Any
) -> None:
    training = Training(model, store, options())
    fitting = planned(training)
    assert fitting is not None
    weights = 4 * model.parameters
    assert fitting == fit(
        model, options(), MemoryBudget(80 * GB - weights, store.length, 8, 1, training.numbers)
    )
    card["bytes"] = weights
    with pytest.raises(ShearlingError, match=r"the weights of flock alone take .*or more GPUs"):
        planned(training)
    distilled = Training(model, store, options(recipe="distill"), teacher)
    card["bytes"] = weights + 1  # enough for the model, and not for both
    with pytest.raises(ShearlingError, match=r"of flock and of ram alone .*--teacher-cache"):
        planned(distilled)
    monkeypatch.setattr(setup, "loaded", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(ShearlingError, match="alone take"):
        setup.prepared(distilled, None)


def test_on_a_processor_nothing_is_planned(model: Checkpoint, store: Store) -> None:
    assert planned(Training(model, store, options())) is None


def test_a_dry_run_says_what_fits_and_refuses_nothing(
    model: Checkpoint, store: Store, card: dict[str, int], tmp_path: Path
) -> None:
    given = ["--data", store.path, "--tokens", "1k", "--output", tmp_path / "out", "--dry-run"]
    heal = [str(one) for one in ("heal", model.path, *given)]
    learn = [
        str(one) for one in ("learn", model.path, "--shape", "mlp=8", *given, "sample_length=16")
    ]
    for command in (heal, learn):
        card["bytes"] = 80 * GB
        ran = CliRunner().invoke(cli.app, command)
        assert ran.exit_code == 0, ran.output
        assert "sequences at a time fit there" in ran.stdout
        for less, options in ((4 * GB, []), (80 * GB, ["--memory", "4GB"])):
            card["bytes"] = less
            ran = CliRunner().invoke(cli.app, [*command, *options])
            assert ran.exit_code == 0, ran.output
            assert "does not fit here: 4.0 GB are free" in ran.stdout


def test_what_is_allowed_of_a_card_counts_what_the_process_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = {"bytes": 50 * GB}
    monkeypatch.setattr(memory, "free_bytes", lambda device: free["bytes"])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 * GB)
    cuda = torch.device("cuda", 0)
    assert free_on_gpu(cuda) == 50 * GB
    assert free_on_gpu(cuda, 20 * GB) == 17 * GB - CONTEXT_BYTES
    assert free_on_gpu(cuda, 3 * GB) == 0
    free["bytes"] = GB  # others have the rest
    assert free_on_gpu(cuda, 20 * GB) == GB
    assert free_on_gpu(torch.device("cpu"), 20 * GB) is None


def test_a_cap_is_kept_from_joining_on(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[tuple[torch.device, int | None]] = []
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(parallel, "join_ranks", lambda device: Ranks(device=cuda))
    monkeypatch.setattr(parallel, "hold_to", lambda device, most: held.append((device, most)))
    assert parallel.join("cuda", 20 * GB).allowed == 20 * GB
    assert held == [(cuda, 20 * GB)]


def test_a_cap_on_a_processor_is_said_to_say_nothing(
    model: Checkpoint, store: Store, tmp_path: Path
) -> None:
    words = ["heal", model.path, "--data", store.path, "--tokens", "1k", "--output", tmp_path / "o"]
    ran = CliRunner().invoke(
        cli.app, [*map(str, words), "--device", "cpu", "--memory", "1GB", "batch=8"]
    )
    assert ran.exit_code == 0, ran.output
    assert "--memory is of a GPU, and says nothing here." in ran.stderr


@pytest.mark.parametrize("there", [True, False])
def test_a_processor_with_a_unit_for_bfloat16_is_named_and_not_taken_unasked(
    there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    capabilities = {"amx_bf16": there}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    processor = torch.device("cpu")
    said = described(processor, "auto", "float32")
    assert "products in float32, as on every CPU" in said
    assert ("--dtype bfloat16" in said) == there
    assert "--dtype" not in described(processor, "bfloat16", "float32")
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert "--dtype" not in described(processor, "auto", "float32")


@pytest.mark.parametrize("variant", ["llama", "qwen2_moe", "gemma4", "gemma4-experts", "qwen3_5"])
def test_adapters_are_counted_as_peft_makes_them(
    models: Callable[[str], Path], variant: str
) -> None:
    """Blocks of several kinds have each only their own projections."""
    source = Checkpoint.open(models(variant))
    adapted = adapters.add(naive.stock(source.path), source, rank=3, alpha=7)
    made = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert adapter_parameters(source, 3) == made
