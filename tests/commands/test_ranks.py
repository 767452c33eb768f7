"""Two processes give what one gives: scores, choice, repaired weights, losses, a teacher's cache.

Two gloo processes are started once, for everything; what they say is compared with this process.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from process_work import everything, walk_rank
from processes import ended, started
from shearling.cli import app
from shearling.engine.ranks import ALONE, Ranks
from shearling.errors import ShearlingError
from tiny_models import tiny_model
from tiny_store import write_store
from tiny_tokenizer import write_llama


def arguments(model: Path, text: Path, output: Path) -> list[str]:
    """A cut of blocks, heads and neurons: scored, repaired, proven."""
    return [
        "prune", str(model), "--output", str(output),
        "--shape", "layers=3,mlp=31,kv_heads=2,heads=6",
        "--calibration", str(text), "--samples", "9", "--length", "17", "--written", "5",
        "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a store and a text, and what two processes made of them in ``two``."""
    root = tmp_path_factory.mktemp("ranks")
    write_llama(root / "model", layers=4)
    write_store(root)
    draw = random.Random(3)
    words = ["sheep", "field", "hill", "gate", "the", "wool", "shepherd"]
    (root / "text.txt").write_text(
        "\n\n".join(" ".join(draw.choices(words, k=40)) for _ in range(40))
    )
    tiny_model("mixtral").save_pretrained(root / "mixture")
    (root / "two" / "solved").mkdir(parents=True)
    said = root / "said"
    places = [str(root / name) for name in ("model", "store", "two")]
    given = arguments(root / "model", root / "text.txt", root / "two" / "cut")
    ended(started(walk_rank, *places, given, ranks=2, said=said), said)
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


def test_processes_merge_the_same_experts(folder: Path) -> None:
    """Each would fold others, by its own tokens, and wait for ever for those that do not."""
    lacks = [json.loads((folder / "two" / f"{n}-merged.json").read_text()) for n in range(2)]
    assert len(lacks[0]) == 10
    assert lacks[0] == pytest.approx(lacks[1])


def test_one_process_speaks(folder: Path) -> None:
    out = [(folder / "two" / f"{rank}.txt").read_text() for rank in range(2)]
    assert "proof of surgery" in out[0]
    assert out[1] == ""
    assert (folder / "said" / "rank-1.txt").read_text() == ""


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
