"""A criterion is one function in one file: all else that names criteria follows from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import shearling.scoring.blocks
import shearling.scoring.units
from shearling.cli import app
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.report.pages.charts import in_words
from shearling.scoring import registry
from shearling.scoring.registry import KINDS, Criterion, criterion, find, names
from shearling.scoring.score import score
from tiny_tokenizer import write_llama

DEPTH, NEURONS = 4, 50
BLOCKS = """
from shearling.scoring.registry import criterion
from shearling.scoring.scores import Scores

@criterion(
    "height", of="blocks", reads=("weights",), plus=True, says="how far up the block's place is",
    work="a test", paper="2611.00001",
)
def height(checkpoint, *, protected, progress):
    values = tuple(float(block) for block in range(checkpoint.shape["layers"]))
    return Scores("height", "layers", (values,), protected)
"""
UNITS = """
from shearling.scoring.registry import criterion

@criterion("mean-square", of="units", reads=("square",), says="mean square of its input")
def mean_square(inlet, width):
    return inlet.sums["square"].view(-1, width).sum(1) / inlet.tokens

@criterion("louder", of="units", joins=("mean-square", "energy"), says="both, added")
def louder(first, second):
    return first + second
"""


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file with a criterion of blocks and one with two of units, beside our own."""
    for package, name, text in (
        (shearling.scoring.blocks, "height", BLOCKS),
        (shearling.scoring.units, "louder", UNITS),
    ):
        folder = tmp_path / package.__name__
        folder.mkdir()
        (folder / f"{name}.py").write_text(text)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    monkeypatch.setattr(registry, "_imported", dict(registry._imported))
    monkeypatch.setattr(registry, "_functions", dict(registry._functions))
    yield tmp_path
    for module in ("blocks.height", "units.louder"):
        sys.modules.pop(f"shearling.scoring.{module}", None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("registry") / "tiny", layers=DEPTH)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "sheep.txt"
    path.write_text("".join(f"{n} sheep went through the gate. " for n in range(60)))
    return path


def test_what_is_read_is_what_is_registered() -> None:
    """Declarations read from source text are those that importing the modules makes."""
    for of in KINDS:
        for name in names(of):
            known = find(name, of)
            plain = name.removesuffix("+")
            assert callable(known.function)
            assert registry._imported[of, plain] == find(plain, of)
            assert known.says
            if known.check:
                assert callable(getattr(sys.modules[known.function.__module__], known.check))


@pytest.mark.usefixtures("added")
def test_a_new_criterion_is_known_by_name(text: Path, model: Path) -> None:
    assert names("blocks")[-2:] == ("height+", "height")
    assert names("units")[-2:] == ("louder", "mean-square")
    checkpoint = Checkpoint.open(model)
    found = score(checkpoint, "height")
    assert (found.criterion, found.values) == ("height", (0.0, 1.0, 2.0, 3.0))
    options: dict[str, Any] = {"axis": "mlp", "calibration": text, "samples": 3, "length": 20}
    first, second, both = (
        score(checkpoint, by, **options) for by in ("mean-square", "energy", "louder")
    )
    assert len(both.rows) == DEPTH
    for one, other, joined in zip(first.rows, second.rows, both.rows, strict=True):
        assert joined == pytest.approx([a + b for a, b in zip(one, other, strict=True)])
        assert min(one) > 0
    with pytest.raises(ShearlingError, match="first 4 and the last 2 of 4 blocks"):
        score(checkpoint, "height+")


@pytest.mark.usefixtures("added")
def test_tables_and_the_report_say_what_it_is() -> None:
    link = "a test, [2611.00001](https://arxiv.org/abs/2611.00001)"
    row = f"| `height`, `height+` | how far up the block's place is | weights alone | {link} |"
    assert row in registry.table("blocks").splitlines()
    assert "| `louder` | both, added | text, forward |  |" in registry.table("units").splitlines()
    assert in_words("height+", "blocks") == "How far up the block’s place is"
    assert in_words("mean-square", "units") == "Mean square of its input"
    assert in_words("entropy", "units") == "Score"


SCRIPT = """
import sys
import shearling.scoring.blocks, shearling.scoring.units
shearling.scoring.blocks.__path__.append(sys.argv[1] + "/shearling.scoring.blocks")
shearling.scoring.units.__path__.append(sys.argv[1] + "/shearling.scoring.units")
from shearling.cli import app
try:
    app(["score", "--help"])
except SystemExit as stop:
    assert not stop.code, stop.code
assert "torch" not in sys.modules
"""


def test_help_tells_of_it(added: Path) -> None:
    """In a process of its own, where help is built after the files are there."""
    command = [sys.executable, "-c", SCRIPT, str(added)]
    wide = {**os.environ, "COLUMNS": "1000", "TERMINAL_WIDTH": "1000"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=wide)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "greedy, height+ or height;" in said
    assert "random, louder or mean-square;" in said


def test_the_command_line_takes_it(added: Path, model: Path, text: Path) -> None:
    arguments = [
        "prune", str(model), "--shape", "layers=3,mlp=30", "--by", "height,louder",
        "--calibration", str(text), "--samples", "3", "--length", "20", "--no-refit",
        "--output", str(added / "pruned"),
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    options = json.loads((added / "pruned" / "shearling.json").read_text())["options"]
    assert (options["criterion"], options["unit_criterion"]) == ("height", "louder")
    assert options["removed"] == [0]


@pytest.mark.usefixtures("added")
def test_a_function_declared_elsewhere_is_known_once_imported(model: Path) -> None:
    from shearling.scoring.scores import Scores

    @criterion("mine", of="blocks", reads=("weights",), says="mine")
    def mine(checkpoint: Checkpoint, *, protected: tuple[int, ...], progress: Any) -> Scores:
        return Scores("mine", "layers", ((1.0,) * checkpoint.shape["layers"],), protected)

    assert score(Checkpoint.open(model), "mine").values == (1.0,) * DEPTH


@pytest.mark.usefixtures("added")
def test_a_name_is_given_once() -> None:
    assert callable(find("repair", "blocks").function)  # imported, and so registered
    register = criterion("repair", of="blocks", reads=("text",), says="another")
    with pytest.raises(ValueError, match=r"criterion 'repair' of blocks, but that is shearling"):
        register(lambda: None)


@pytest.mark.parametrize(
    "facts",
    [
        {"of": "rows", "reads": ("text",)},
        {"of": "blocks"},
        {"of": "blocks", "reads": ("square",)},
        {"of": "units", "reads": ("cube",)},
        {"of": "units", "reads": ("square",), "joins": ("energy",)},
        {"of": "units", "reads": ("square",), "removes": True},
        {"of": "units", "reads": ("text",), "whole_groups": True},
        {"of": "units", "reads": ("fisher",), "backward": True},
    ],
)
def test_facts_that_would_drive_nothing(facts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="criterion 'new'"):
        Criterion(name="new", says="new", **facts)


def test_facts_must_be_literals(added: Path) -> None:
    file = added / "shearling.scoring.blocks" / "computed.py"
    file.write_text(BLOCKS.replace('"a test"', "'a ' + who").replace('"height"', '"computed"'))
    registry._declared.cache_clear()
    try:
        with pytest.raises(ValueError, match="facts must be literals"):
            names("blocks")
    finally:
        registry._declared.cache_clear()
