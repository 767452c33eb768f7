"""Seeds as large as the commands take them, wherever one is read or combined."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from shearling.data.pack import PackPlan, pack
from shearling.data.seeds import LARGEST, folded
from shearling.data.store import Store
from shearling.gates.learn import learn
from shearling.gates.options import LearnOptions
from shearling.model.checkpoint import Checkpoint
from shearling.scoring.score import score
from shearling.train.heal import heal
from shearling.train.loop import _step_seed
from shearling.train.options import Options
from tiny_store import LENGTH, write_store
from tiny_tokenizer import byte_tokenizer, write_llama


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("seeds")
    write_store(root)
    write_llama(root / "model", layers=3)
    return root


@pytest.mark.parametrize("seed", [0, 1, 12_345, 2**27])  # beyond, torch took none
def test_small_seeds_are_as_they_were(seed: int) -> None:
    assert folded(seed) == folded(seed, bits=32) == seed
    assert _step_seed(seed, 7, 3) == (seed * 1_000_003 + 7) * 65_537 + 3


def test_a_generator_takes_what_is_folded() -> None:
    for seed in (2**64 - 1, 2**64, LARGEST * 1_000_003 + 5, 10**40):
        torch.Generator().manual_seed(folded(seed))
        torch.manual_seed(folded(seed))
        np.random.seed(folded(seed, bits=32))
        assert 0 <= folded(seed, bits=32) < 2**32
    drawn = [folded(2**64 + random.Random(i).getrandbits(80)) for i in range(1000)]
    assert len(set(drawn)) == 1000


def test_steps_of_the_largest_seed_differ() -> None:
    seeds = {_step_seed(LARGEST, step, rank) for step in range(50) for rank in range(4)}
    assert len(seeds) == 200
    assert max(seeds) < 2**64


def test_score(place: Path) -> None:
    checkpoint, text = Checkpoint.open(place / "model"), place / "fell.jsonl"
    scored = [
        score(checkpoint, "influence", calibration=text, samples=2, length=8, seed=seed)
        for seed in (LARGEST, LARGEST, 0)
    ]
    assert scored[0].values == scored[1].values != scored[2].values


def test_pack(place: Path, tmp_path: Path) -> None:
    plan = PackPlan.of(
        [str(place / "fell.jsonl")], byte_tokenizer(), "flock", length=LENGTH, held_out=0.2,
        seed=LARGEST,
    )  # fmt: skip
    pack(plan, tmp_path / "store", workers=1)
    assert Store.open(tmp_path / "store").manifest.seed == LARGEST


@pytest.mark.parametrize("recipe", ["cpt", "lora"])
def test_heal(place: Path, tmp_path: Path, recipe: str) -> None:
    values = {"tokens": 100, "batch": 2, "eval_sequences": 1, "seed": LARGEST, "recipe": recipe}
    options = Options.model_validate(values)
    source, store = Checkpoint.open(place / "model"), Store.open(place / "store")
    assert heal(source, store, options, tmp_path / "out").model is not None


def test_learn(place: Path, tmp_path: Path) -> None:
    values = {
        "tokens": 100, "batch": 2, "eval_sequences": 1, "seed": LARGEST, "samples": 4,
        "sample_length": 16, "warm_start": False,
    }  # fmt: skip
    source, store = Checkpoint.open(place / "model"), Store.open(place / "store")
    target = source.shape.with_(layers=2, mlp=20)
    learn(source, target, store, LearnOptions.model_validate(values), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()
