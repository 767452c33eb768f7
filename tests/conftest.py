"""Tiny random models of odd geometry, one for every family and variant that changes its table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

import processes
from shearling.files import child
from tiny_models import LEADING, VARIANTS, tiny_model

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped where torch sees none."""
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


@pytest.fixture(params=list(LEADING))
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=list(VARIANTS))
def every_variant(request: pytest.FixtureRequest) -> str:
    """Those as well that are another's kin: for tests that cost next to nothing."""
    return request.param


@pytest.fixture
def ids() -> torch.Tensor:
    """Tokens (6, 17) of the tiny vocabulary; an odd length, longer than the windows."""
    return torch.randint(3, 101, (6, 17), generator=torch.Generator().manual_seed(1))
