"""The API's verbs: the same work as the commands, under names that no module takes away."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

import shearling
from process_work import import_everything
from processes import ended, started
from shearling.cli import app
from shearling.files.writer import file_digest
from tiny_tokenizer import write_llama

SOURCE = Path(shearling.__file__).parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("api") / "tiny-llama", layers=8)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "sheep.jsonl"
    lines = [f"{n} sheep went through the gate, and {n + 1} came back." for n in range(40)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def weights(directory: Path) -> dict[str, str]:
    return {file.name: file_digest(file) for file in sorted(directory.glob("*.safetensors"))}


def test_prune_is_what_the_command_does(model: Path, text: Path, tmp_path: Path) -> None:
    command = [
        "prune", model, "--shape", "layers=6,mlp=24", "--calibration", text, "--samples", 8,
        "--length", 16, "--written", 4, "--seed", 3, "--output", tmp_path / "command",
    ]  # fmt: skip
    result = CliRunner().invoke(app, [str(part) for part in command])
    assert result.exit_code == 0, result.output
    calibration = shearling.CalibrationText(file=text, samples=8, length=16, written=4, seed=3)
    size = shearling.Size(shape={"layers": 6, "mlp": 24})
    made = shearling.prune(
        shearling.Checkpoint.open(model), tmp_path / "api", size, calibration=calibration
    )
    assert dict(made.shape)["layers"] == 6
    assert weights(tmp_path / "command") == weights(tmp_path / "api") != {}
    manifest = json.loads((tmp_path / "api" / "shearling.json").read_text())
    assert manifest["options"]["repair"]["steps"]


def test_prune_without_text_is_the_surgery(model: Path, tmp_path: Path) -> None:
    source = shearling.Checkpoint.open(model)
    shearling.prune(source, tmp_path / "pruned", shearling.Size(remove=(2, 5)))
    shearling.cut(source, shearling.without([2, 5], 8), tmp_path / "cut")
    assert weights(tmp_path / "pruned") == weights(tmp_path / "cut") != {}
    before, after = (load_file(path / "model.safetensors") for path in (model, tmp_path / "cut"))
    moved, name = "model.layers.3.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight"
    assert after[name].equal(before[moved])


def test_prune_warns_as_python_does(model: Path, tmp_path: Path) -> None:
    source, size = shearling.Checkpoint.open(model), shearling.Size(layers=6, remove=(2, 5))
    criteria = shearling.Criteria(protect_first=2)
    with pytest.warns(UserWarning, match="--protect-first ignored: the blocks are already chosen"):
        shearling.prune(source, tmp_path / "pruned", size, criteria=criteria)


@pytest.mark.parametrize("asked", [{}, {"layers": 5, "params": "0.8x"}, {"shape": {}, "params": 9}])
def test_a_size_is_said_once(asked: dict) -> None:
    with pytest.raises(shearling.ShearlingError, match="nothing says|were both given"):
        shearling.Size(**asked)


def test_no_module_takes_the_place_of_a_name() -> None:
    """A submodule that is imported becomes an attribute of the package, under its own name."""
    modules = {path.stem for path in SOURCE.glob("*.py")} | {
        path.parent.name for path in SOURCE.glob("*/__init__.py")
    }
    assert modules & set(shearling.__all__) == set()


def test_names_survive_the_import_of_everything(tmp_path: Path) -> None:
    ended(started(import_everything, said=tmp_path), tmp_path)


def test_every_name_has_a_type_for_checkers() -> None:
    """What is imported on first use stands in the block that type checkers read as well."""
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(shearling.__all__) <= imported
