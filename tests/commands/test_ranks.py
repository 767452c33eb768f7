"""Two processes give what one gives: scores, choice, repaired weights, losses, a teacher's cache.

Two gloo processes are started once, for everything; what they say is compared with this process.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from shearling.cli import app
from shearling.data.store import Store
from shearling.engine.place import Place, Wish
from shearling.engine.ranks import ALONE, Ranks
from shearling.engine.stream import BlockStream
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.scoring.score import score_tokens
from shearling.scoring.score_units import score_units
from shearling.train.reference import measure
from shearling.train.teach import teach
from tiny_store import write_store
from tiny_tokenizer import write_llama

BLOCKS = ("repair", "perplexity", "influence", "taylor")
UNITS = ("fisher-energy", "obs", "taylor", "activation")
AXES = ("mlp", "heads", "hidden")
# An odd number of sequences, in batches of two, so that the processes' shares differ.
SEQUENCES, LENGTH, BATCH_TOKENS = 13, 17, 34


def tokens(sequences: int = SEQUENCES) -> torch.Tensor:
    return torch.randint(3, 259, (sequences, LENGTH), generator=torch.Generator().manual_seed(4))


def everything(model: str, store: str, output: Path, ranks: Ranks) -> dict[str, Any]:
    """What the walks find, in JSON; ``output`` gets a teacher's cache."""
    checkpoint, packed = Checkpoint.open(model), Store.open(store)
    place = Place.best(checkpoint, Wish(device="cpu", ranks=ranks))
    place = replace(place, batch_tokens=BATCH_TOKENS)
    stream, found = BlockStream(checkpoint, place), {}
    for by in BLOCKS:
        scored = score_tokens(stream, by, tokens(), remove=2)
        found[by] = [*scored.values, *scored.order]
    for by in UNITS:
        units = score_units(stream, by, tokens(), AXES)
        found[f"{by} of units"] = {axis: scored.rows for axis, scored in units.items()}
    # Fewer sequences than processes: each runs them all.
    found["one sequence"] = score_tokens(stream, "perplexity", tokens(1)).values
    found["reference"] = measure(checkpoint, packed, 3, place=place)
    teach(checkpoint, packed, output / "cache", top=5, place=place)
    return found


SCRIPT = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from shearling.cli import main
from shearling.engine.ranks import join_ranks, leave
from test_ranks import everything
model, store, output, *arguments = sys.argv[1:]
ranks = join_ranks("cpu")
found = everything(model, store, Path(output), ranks)
Path(output, f"{ranks.rank}.json").write_text(json.dumps(found))
leave()
sys.argv = ["shearling", *arguments]
main()
"""


def arguments(model: Path, text: Path, output: Path) -> list[str]:
    """A cut of blocks, heads and neurons: scored, repaired, proven."""
    return [
        "prune", str(model), "--output", str(output),
        "--shape", "layers=4,mlp=31,kv_heads=2,heads=6",
        "--calibration", str(text), "--samples", "13", "--length", "17", "--written", "5",
        "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a store and a text, and what two processes made of them in ``two``."""
    root = tmp_path_factory.mktemp("ranks")
    write_llama(root / "model", layers=6)
    write_store(root)
    draw = random.Random(3)
    words = ["sheep", "field", "hill", "gate", "the", "wool", "shepherd"]
    (root / "text.txt").write_text(
        "\n\n".join(" ".join(draw.choices(words, k=40)) for _ in range(40))
    )
    (root / "two").mkdir()
    port = str(20000 + (os.getpid() * 7 + int(time.time() * 1000)) % 30000)
    places = [str(root / name) for name in ("model", "store", "two")]
    given = arguments(root / "model", root / "text.txt", root / "two" / "cut")
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *places, *given],
            env=os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)]),
            },
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=200) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    (root / "said.json").write_text(json.dumps(said))
    return root


def flat(value: Any) -> list[float]:
    """All numbers in some JSON."""
    if isinstance(value, dict):
        return [number for key in sorted(value) for number in flat(value[key])]
    return [n for each in value for n in flat(each)] if isinstance(value, list | tuple) else [value]


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    """What this process finds by itself."""
    (folder / "one").mkdir()
    return everything(str(folder / "model"), str(folder / "store"), folder / "one", ALONE)


def test_scores_and_losses_do_not_depend_on_the_number_of_processes(
    folder: Path, one: dict[str, Any]
) -> None:
    for rank in range(2):
        two = json.loads((folder / "two" / f"{rank}.json").read_text())
        assert two.keys() == one.keys()
        for name, expected in one.items():
            assert flat(two[name]) == pytest.approx(flat(expected), rel=1e-5), name


def test_a_teachers_cache_does_not_depend_on_the_number_of_processes(
    folder: Path, one: dict[str, Any]
) -> None:
    files = sorted((folder / "one" / "cache").rglob("*.safetensors"))
    assert files
    for file in files:
        expected = load_file(file)
        kept = load_file(folder / "two" / file.relative_to(folder / "one"))
        assert torch.equal(kept["ids"], expected["ids"])
        torch.testing.assert_close(kept["logp"], expected["logp"], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(kept["rest"], expected["rest"], atol=1e-5, rtol=1e-4)


def test_a_cut_does_not_depend_on_the_number_of_processes(folder: Path) -> None:
    """The same choice and, within 1e-5, the same repaired weights."""
    given = arguments(folder / "model", folder / "text.txt", folder / "one-cut")
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    manifests = [
        json.loads((folder / name / "shearling.json").read_text())
        for name in ("one-cut", "two/cut")
    ]
    assert manifests[1]["keep"] == manifests[0]["keep"]
    assert manifests[1]["repaired"] == manifests[0]["repaired"] != []
    assert manifests[1]["proof"]["passed"]
    steps = [manifest["options"]["repair"]["steps"] for manifest in manifests]
    assert [step["strength"] for step in steps[1]] == [step["strength"] for step in steps[0]]
    weights = [load_file(folder / n / "model.safetensors") for n in ("one-cut", "two/cut")]
    assert "model.norm.weight" in manifests[0]["repaired"]
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, atol=1e-5, rtol=1e-5, msg=name)


def test_one_process_speaks(folder: Path) -> None:
    (first_out, _), (second_out, second_err) = json.loads((folder / "said.json").read_text())
    assert "proof of surgery" in first_out
    assert (second_out, second_err) == ("", "")


# --- without starting any ------------------------------------------------------------------------


def test_shares_are_dealt_out_and_put_together() -> None:
    ranks = [Ranks(rank, 3) for rank in range(3)]
    assert [each.mine(7) for each in ranks] == [[0, 3, 6], [1, 4], [2, 5]]
    assert [each.mine(2, backward=True) for each in ranks] == [[], [1], [0]]
    assert ranks[2].of(3) is ranks[2]
    assert ranks[2].of(2) is ALONE


def test_work_of_one_process_is_refused_to_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(app, ["inspect", "nowhere"])
    assert isinstance(result.exception, ShearlingError)
    assert "2 processes were started, but `shearling inspect`" in str(result.exception)
