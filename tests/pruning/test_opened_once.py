"""One run: the source is opened once as a running model, and its text tokenised once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import shearling.data.calibration
from shearling.data.sources import TextSource
from shearling.engine.place import Place, Wish
from shearling.engine.stream import BlockStream
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.run import Run, Wanted
from shearling.repair.calibration import Calibration
from tiny_tokenizer import write_llama


@pytest.mark.parametrize("stream", [False, True])
def test_a_whole_prune(stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Checkpoint.open(write_llama(tmp_path / "flock", layers=4))
    text = tmp_path / "text.txt"
    text.write_text("The shearer shears the sheep on the hill. " * 40)
    opened: list[Any] = []
    tokenised: list[Any] = []
    enter = BlockStream._open
    windows = shearling.data.calibration.calibration_windows

    def noting(self: BlockStream, checkpoint: Checkpoint, *rest: Any) -> None:
        opened.append(checkpoint)
        enter(self, checkpoint, *rest)

    monkeypatch.setattr(BlockStream, "_open", noting)
    monkeypatch.setattr(
        shearling.data.calibration,
        "calibration_windows",
        lambda *args, **options: tokenised.append(args) or windows(*args, **options),
    )
    said: list[str] = []
    here = replace(Place.best(source, Wish(device="cpu", stream=stream)), tell=said.append)
    run = Run(source, Calibration((TextSource(text),), samples=8, length=16), place=here)
    choice = run.choose(Wanted(source.shape.with_(layers=3, mlp=40)))
    run.write(choice, tmp_path / "out")
    assert sum(checkpoint is source for checkpoint in opened) == 1
    assert len(tokenised) == 1
    assert said == list(run.place.lines())
