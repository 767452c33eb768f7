"""Out of memory in the middle of a walk: fewer sequences at a time, and the same results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP

from places import place
from shearling.engine.pieces import Pieced, Pieces
from shearling.engine.place import Place
from shearling.engine.stream import BlockStream
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.repair.refit import refit
from shearling.scoring.score import score_tokens
from shearling.scoring.score_units import score_units
from shearling.table.values import Keep

Models = Callable[[str], Path]


def tokens(count: int = 9) -> Tensor:
    return torch.randint(3, 101, (count, 17), generator=torch.Generator().manual_seed(0))


def little_memory(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """An MLP of more sequences than so many does not fit: found out behind the attention."""
    forward = LlamaMLP.forward

    def limited(self: LlamaMLP, x: Tensor) -> Tensor:
        if len(x) > rows:
            raise torch.OutOfMemoryError(f"{len(x)} sequences")
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", limited)


def everything(checkpoint: Checkpoint, where: Place, directory: Path) -> dict[str, Tensor]:
    """Walks forward and back, with and without listeners, and a repair's weights."""
    stream, ids_NS = BlockStream(checkpoint, where), tokens()
    found = {
        by: torch.tensor(score_tokens(stream, by, ids_NS, remove=2).values)
        for by in ("perplexity", "influence", "taylor", "repair")
    }
    for by in ("fisher-energy", "obs", "taylor"):
        rows = score_units(stream, by, ids_NS, ["mlp"])["mlp"].rows
        found[f"{by} of units"] = torch.tensor(rows)
    directory.mkdir()
    refit(stream, Keep({"layers": (0, 2, 4)}), ids_NS, directory)
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_that_does_not_fit_is_run_in_halves(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    said: list[str] = []
    where = replace(place(), dtype=dtype, tell=said.append)
    expected = everything(checkpoint, where, tmp_path / "whole")
    assert said == []
    little_memory(monkeypatch, 2)
    found = everything(checkpoint, where, tmp_path / "halves")
    assert found.keys() == expected.keys()
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    for name, tensor in expected.items():
        distance = float((found[name].double() - tensor.double()).norm() / tensor.double().norm())
        assert distance < bound, name
    assert "cpu ran out of memory with 9 sequences at a time; the step is repeated with 4." in said
    assert said[0] != said[1] == said[0].replace("9", "4").replace("with 4.", "with 2.")


def test_what_a_failed_attempt_noted_is_forgotten() -> None:
    """The second piece fails once; its hook has noted its input by then."""
    seen, failures, pieces = Pieced(), [1], Pieces(place())
    pieces.rows = 2

    def run(x: Tensor) -> Tensor:
        seen["x"] = x
        if int(x[0]) == 2 and failures:
            failures.pop()
            raise torch.OutOfMemoryError
        return 2 * x

    assert torch.cat(pieces.run(run, torch.arange(5))).tolist() == [0, 2, 4, 6, 8]
    assert seen["x"].tolist() == [0, 1, 2, 3, 4]
    assert pieces.rows == 1


def test_one_sequence_that_does_not_fit(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = BlockStream(Checkpoint.open(models("llama")), place())
    little_memory(monkeypatch, 0)
    with pytest.raises(ShearlingError, match=r"cpu has too little memory .* of 17 tokens"):
        score_tokens(stream, "perplexity", tokens())


def test_other_errors_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(x: Any) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Pieces(place()).run(broken, torch.arange(3))
