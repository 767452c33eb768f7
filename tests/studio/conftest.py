from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tiny_tokenizer import CHAT, write_llama

pytest.importorskip("starlette", reason="the extra studio is not installed")
pytest.importorskip("uvicorn", reason="the extra studio is not installed")

from shearling.studio.worker import StudioWorker


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template."""
    return write_llama(tmp_path_factory.mktemp("studio") / "dense", layers=3, template=CHAT)


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller one, without."""
    return write_llama(tmp_path_factory.mktemp("studio") / "pruned", layers=1)


@pytest.fixture(scope="session")
def worker(dense: Path) -> Iterator[StudioWorker]:
    """The dense model's process; a second one would take seconds to import torch."""
    found = StudioWorker(dense, threads=1)
    yield found
    found.close()
