"""A packed store of three tiny domains, and two tiny models of its tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from shearling.data.store import Store
from shearling.model.checkpoint import Checkpoint
from tiny_store import write_store
from tiny_tokenizer import write_llama


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "flock", layers=3)


@pytest.fixture(scope="session")
def model(model_path: Path) -> Checkpoint:
    return Checkpoint.open(model_path)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_llama(tmp_path_factory.mktemp("models") / "ram", layers=5))


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_store(tmp_path_factory.mktemp("store"))
