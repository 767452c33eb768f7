"""Dry runs say where the work would lie and what it would take, and do none of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shearling import cli
from shearling.engine.stream import BlockStream
from shearling.errors import ShearlingError
from tiny_tokenizer import write_llama

TEXT = ("--samples", 8, "--length", 32)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dry")
    write_llama(root / "model", layers=4)
    (root / "text.txt").write_text("the sheep went through the gate. " * 400)
    return root


@pytest.fixture(autouse=True)
def unrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockStream, "__init__", lambda *_: pytest.fail("a model was opened"))


def run(*arguments: Any) -> str:
    ran = CliRunner().invoke(cli.app, [*map(str, arguments), "--dry-run"])
    if ran.exception is not None:
        raise ran.exception
    return ran.stdout


def test_score(here: Path, tmp_path: Path) -> None:
    asked = ("score", here / "model", "--by", "perplexity", "--output", tmp_path / "scores.json")
    given = ("--calibration", here / "text.txt", *TEXT)
    said = run(*asked, *given)
    assert "would score layers of model by perplexity on 256 tokens" in said
    # A loss without each block: all blocks' states are kept, 36 float32 a token and block.
    assert f"its states {4 * 256 * 5 * 36 / 1e9:.1f} GB" in said
    plan = json.loads(run(*asked, *given, "--protect-last", 1, "--json"))
    assert (plan["tokens"], plan["protected"]) == (256, [3])
    assert json.loads(run("score", here / "model", "--by", "magnitude", "--json"))["tokens"] == 0
    assert list(tmp_path.iterdir()) == []
    for wrong, words in (
        ((), "criterion perplexity runs the model on text"),
        ((*given, "--axis", "mlp"), "does not score units of mlp"),
        ((*given, "--protect-first", 4), "protect"),
        (("--calibration", here / "none.txt"), "There is no text at"),
    ):
        with pytest.raises(ShearlingError, match=words):
            run(*asked, *wrong)


def test_several_sizes_say_what_they_take_together(here: Path, tmp_path: Path) -> None:
    asked = ("prune", here / "model", "--output", tmp_path / "out", "--no-stream")
    # So much text that the repair takes most: what waits between its blocks.
    asked += ("--calibration", here / "text.txt", "--samples", 200, "--length", 64)
    one = json.loads(run(*asked, "--shape", "layers=3", "--json"))["memory"]
    sizes = ("--shape", "layers=3", "--shape", "layers=2")
    both = json.loads(run(*asked, *sizes, "--json"))["memory"]
    assert (one["stage"], both["stage"]) == ("repairing", "repairing")
    # States of each further cut wait beside those of the first.
    assert both["states"] > one["states"]
    assert both["peak_bytes"] > one["peak_bytes"]
    assert "needs about" in run(*asked, *sizes)


def test_writing_says_where(here: Path, tmp_path: Path) -> None:
    written = run("write", here / "model", "--tokens", 64, "--length", 32, "--output",
                  tmp_path / "own.jsonl")  # fmt: skip
    assert "weights in memory" in written


CALIBRATED = ("--calibration", "text.txt", "--samples", 4)


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--by", "influence"), "criterion influence runs the model on text; give --calibration"),
        (("--shape", "mlp=40", "--by", "flap"), "criterion flap runs the model on text"),
        ((*CALIBRATED, "--length", 100), "100 tokens are longer than the 64 positions of model"),
        ((*CALIBRATED, "--length", 32, "--protect-first", 2, "--protect-last", 2), "leaves none"),
        ((*CALIBRATED, "--length", 32, "--protect-first", 3), "only 1 is not protected"),
        (("--calibration", "text.txt", "--samples", 900, "--length", 64), "ask for fewer samples"),
        (
            ("--params", "0.9x,0.5x", "--by", "influence,magnitude-l2"),
            "criterion influence runs the model",
        ),
    ],
)
def test_prune_refuses_dry_what_it_refuses_wet(
    here: Path, tmp_path: Path, monkeypatch, given: tuple, words: str, *, dry: bool
) -> None:
    """Both before a model is opened, which would fail here, and with nothing written."""
    monkeypatch.chdir(here)
    size = () if {"--params", "--shape"} & set(given) else ("--layers", 2)
    asked = ("prune", "model", "--output", tmp_path / "out", "--no-refit", *size, *given)
    ran = CliRunner().invoke(cli.app, [*map(str, asked), *(["--dry-run"] if dry else [])])
    assert isinstance(ran.exception, ShearlingError), ran.output
    assert words in str(ran.exception)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_that_nothing_will_be_repaired(here: Path, tmp_path: Path) -> None:
    asked = ("prune", here / "model", "--output", tmp_path / "out", "--layers", 3, "--dry-run")
    asked += ("--calibration", here / "text.txt", "--length", 32)
    ran = CliRunner().invoke(cli.app, [*map(str, asked), "--samples", "2"])
    assert "the repair is left out, as it needs at least 4" in ran.stderr


@pytest.mark.parametrize("further", [("--dry-run",), ()])
def test_score_refuses_windows_beyond_the_positions(here: Path, further: tuple[str, ...]) -> None:
    asked = ("score", here / "model", "--by", "perplexity", "--calibration", here / "text.txt")
    ran = CliRunner().invoke(cli.app, [*map(str, asked), "--length", "100", *further])
    assert "100 tokens are longer than the 64 positions" in str(ran.exception)
