"""``prune --no-final-norm``: the gain stays; manifest, terminal and report say so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shearling import cli
from shearling.report.pages.lineage import _repair
from shearling.report.records.records import Manifest
from tiny_tokenizer import write_llama


def test_the_final_norm_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_llama(tmp_path / "model", layers=4)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} sheep went through the gate. " for n in range(400)))
    repairs, gains, lines = [], [], []
    for number, option in enumerate(([], ["--no-final-norm"])):
        output = tmp_path / f"cut{number}"
        arguments = [
            "prune", str(source), "--layers", "3", "--calibration", str(text), "--samples", "8",
            "--length", "16", "--output", str(output), *option,
        ]  # fmt: skip
        cli.app(arguments, standalone_mode=False)
        lines.append(capsys.readouterr().out)
        manifest = json.loads((output / "shearling.json").read_text())
        repairs.append(manifest["options"]["repair"])
        gains.append(load_file(output / "model.safetensors")["model.norm.weight"])
    assert [repair["final_norm"] for repair in repairs] == [True, False]
    assert repairs[0]["steps"] == repairs[1]["steps"], "all else is repaired alike"
    assert repairs[1]["divergence"] is None
    assert torch.equal(gains[1], load_file(source / "model.safetensors")["model.norm.weight"])
    assert torch.equal(gains[0], gains[1]) == (repairs[0]["divergence"] is None)
    assert ["--no-final-norm" in line for line in lines] == [False, True]


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"final_norm": False, "divergence": None}, "; the final norm was not fitted"),
        ({"divergence": [0.5, 0.25]}, "; the final norm was fitted: 0.500 to 0.250 nats"),
        ({"divergence": [0.5, 0.25], "divergence_words": 20111}, "over 20,111 words"),
        ({"divergence": None}, ""),
    ],
)
def test_the_report_says_it(facts: dict[str, object], said: str) -> None:
    steps = [{"strength": 0.1, "error_before": 2.0, "error_after": 1.0}]
    step = Manifest.__new__(Manifest)
    object.__setattr__(step, "options", {"repair": {"steps": steps, "tokens": 100} | facts})
    sentence = _repair(step)
    assert said in sentence
    assert ("final norm" in sentence) == bool(said)
