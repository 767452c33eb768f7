"""A tiny model and a packed store of its tokenizer."""

from __future__ import annotations

import pytest

from shearling.data.store import Store
from shearling.model.checkpoint import Checkpoint
from tiny_store import write_store
from tiny_tokenizer import write_llama


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_llama(tmp_path_factory.mktemp("models") / "flock", layers=3))


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_store(tmp_path_factory.mktemp("store"))
