"""A packed store of three tiny domains, and two tiny models of its tokenizer."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from shearling.checkpoint import Checkpoint
from shearling.data.pack import Plan, pack
from shearling.data.store import Store
from tiny_tokenizer import byte_tokenizer, write_llama

LENGTH = 24


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
def store(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Store:
    """Domains of 3:2:1 documents of a few words each."""
    root = tmp_path_factory.mktemp("store")
    draw = random.Random(0)
    words = ["sheep", "gate", "wool", "went", "through", "the"]
    for name, documents in (("fell", 90), ("meadow", 60), ("pen", 30)):
        lines = [
            json.dumps({"text": " ".join(draw.choices([*words, name], k=draw.randint(4, 30)))})
            for _ in range(documents)
        ]
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    files = [str(root / f"{name}.jsonl") for name in ("fell", "meadow", "pen")]
    plan = Plan.of(files, byte_tokenizer(), "flock", length=LENGTH, held_out=0.2)
    pack(plan, root / "store", workers=1)
    return Store.open(root / "store")
