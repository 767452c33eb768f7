"""Tiny random models of odd geometry, one for every family and variant that changes its table.

torch is imported where tests are collected and run, not by the process that hands them out.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

import processes
from shearling.files import child
from tiny_models import LEADING, VARIANTS, tiny_model

if TYPE_CHECKING:
    from torch import Tensor

    from tiny_cuts import Narrowed


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """What is imported stays: no collection of garbage looks through millions of objects."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(10_000, 20, 20)  # what tests import later is looked through less often
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped where torch sees none; all others run on one thread."""
    import torch

    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        reason = pytest.mark.skip(reason="torch sees no GPU here")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(reason)


@pytest.fixture(scope="session", autouse=True)
def _children_import_nothing() -> Iterator[None]:
    """A model's own process begins at once; tests/files/test_child.py starts one as users do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child, "_context", processes.context)
        yield


@pytest.fixture(autouse=True)
def _flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are not waited for until they are on the disk; those in tests/files are.

    Only what a loss of power leaves depends on it, and slow disks take minutes for all tests.
    """
    monkeypatch.setattr(os, "fsync", os.fstat)  # a descriptor that is none is still refused


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Variant -> directory of its tiny model, written by stock transformers."""
    root = tmp_path_factory.mktemp("models")

    def directory(variant: str) -> Path:
        path = root / variant
        if not path.is_dir():
            tiny_model(variant).save_pretrained(path)
        return path

    return directory


@pytest.fixture(scope="session")
def narrowed(models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Narrowed:
    """Variant -> its model, a choice on all axes, and the model cut to it; cut once."""
    from shearling.pruning.cut import cut
    from tiny_cuts import AXES, prepared

    root = tmp_path_factory.mktemp("narrowed")
    known: dict[str, Any] = {}

    def made(variant: str) -> Any:
        if variant not in known:
            checkpoint, keep = prepared(models, variant, AXES)
            known[variant] = (checkpoint, keep, cut(checkpoint, keep, root / variant))
        return known[variant]

    return made


@pytest.fixture(params=list(LEADING))
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=list(VARIANTS))
def every_variant(request: pytest.FixtureRequest) -> str:
    """Those as well that are another's kin: for tests that cost next to nothing."""
    return request.param


@pytest.fixture
def ids() -> Tensor:
    """Tokens (6, 17) of the tiny vocabulary; an odd length, longer than the windows."""
    import torch

    return torch.randint(3, 101, (6, 17), generator=torch.Generator().manual_seed(1))
