"""The examples of CONTRIBUTING.md do what it says: a criterion scores, a family opens and cuts."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import naive
import shearling.scoring.units
import shearling.table.families
import tiny_models
from places import place
from shearling.engine.stream import BlockStream
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.cut import cut
from shearling.scoring import registry
from shearling.scoring.registry import find, names
from shearling.scoring.score_units import score_units
from shearling.table.families import FAMILIES
from shearling.table.values import Keep
from test_rooms import ROOMS

Models = Callable[[str], Path]

PAGE = (Path(__file__).resolve().parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
DEPTH, HEADS, HEAD_DIM, NEURONS = 5, 9, 6, 50
KEPT_BLOCKS, KEPT_GROUPS = (0, 2, 4), (0, 2)
KEPT_NEURONS = tuple(n for n in range(NEURONS) if n % 7)

SETTINGS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "no biases, tied": {"attention_bias": False, "tie_word_embeddings": True},
}


def example(playbook: str) -> str:
    """The one block of Python under a heading."""
    section = PAGE.split(f"## Playbook: {playbook}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return code


def saved_as(playbook: str) -> str:
    """The file name that a playbook tells to save its example as."""
    section = PAGE.split(f"## Playbook: {playbook}\n")[1]
    match = re.search(r"saved as\s+`src/shearling/\w+/\w+/(\w+\.py)`", section)
    assert match
    return match[1]


def save_beside(
    package: Any, playbook: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Write an example where a package looks for its modules; the module's full name."""
    file = directory / saved_as(playbook)
    file.write_text(example(playbook), encoding="utf-8")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(directory)])
    return f"{package.__name__}.{file.stem}"


def test_the_rooms_are_those_of_the_plan() -> None:
    section = PAGE.split("## The rooms\n")[1].split("\n## ")[0]
    assert tuple(re.findall(r"^\d+\. `(\w+)`: \w", section, re.MULTILINE)) == ROOMS


# --- the criterion -------------------------------------------------------------------------------


@pytest.fixture
def criterion_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The example, saved as a file of scoring/units."""
    monkeypatch.setattr(registry, "_imported", dict(registry._imported))
    monkeypatch.setattr(registry, "_functions", dict(registry._functions))
    module = save_beside(shearling.scoring.units, "add a criterion", tmp_path, monkeypatch)
    yield module
    sys.modules.pop(module, None)
    vars(shearling.scoring.units).pop(module.rpartition(".")[2], None)


def variances(path: Path, leaf: str, width: int, ids_NS: Tensor) -> list[list[float]]:
    """Variance over all tokens of what enters a module, summed over ``width`` columns, by block."""
    model = naive.stock(path)
    inputs: list[Tensor] = []
    for block in naive.blocks(model):
        (module,) = (m for name, m in block.named_modules() if name.split(".")[-1] == leaf)
        module.register_forward_pre_hook(lambda _, given: inputs.append(given[0].double()))
    with torch.no_grad():
        model(input_ids=ids_NS, use_cache=False)
    return [
        [
            sum(float(column.var(correction=0)) for column in unit)
            for unit in x_BSC.flatten(0, 1).T.split(width)
        ]
        for x_BSC in inputs
    ]


def test_the_criterion_is_known_by_its_declaration(criterion_module: str) -> None:
    assert "input-variance" in names("units")
    assert criterion_module not in sys.modules  # read, not imported
    assert find("input-variance", "units").home == f"{criterion_module}:input_variance"
    row = "| `input-variance` | variance of its input over tokens | text, forward | an example |"
    assert row in registry.table("units").splitlines()


@pytest.mark.usefixtures("criterion_module")
def test_the_criterion_scores_as_it_is_defined(models: Models, ids: Tensor) -> None:
    path = models("llama")
    stream = BlockStream(Checkpoint.open(path), place())
    scores = score_units(stream, "input-variance", ids, ["mlp", "heads", "kv_heads"])
    neurons = variances(path, "down_proj", 1, ids)
    heads = variances(path, "o_proj", HEAD_DIM, ids)
    assert [len(neurons), len(neurons[0]), len(heads[0])] == [DEPTH, NEURONS, HEADS]
    groups = [[sum(row[group : group + 3]) for group in (0, 3, 6)] for row in heads]
    for axis, expected in (("mlp", neurons), ("heads", heads), ("kv_heads", groups)):
        for row, expected_row in zip(scores[axis].rows, expected, strict=True):
            assert row == pytest.approx(expected_row, rel=1e-4, abs=1e-9)


def test_the_criterion_is_not_in_the_package() -> None:
    assert "input-variance" not in names("units")


# --- the family ----------------------------------------------------------------------------------


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example, saved as a file of table/families and registered."""
    package = shearling.table.families
    module = save_beside(package, "add a family", tmp_path, monkeypatch)
    glm = import_module(module).GLM
    monkeypatch.setitem(FAMILIES, glm.model_type, glm)
    yield
    sys.modules.pop(module, None)
    vars(package).pop(module.rpartition(".")[2], None)


def tiny_glm(path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> Any:
    """A random model whose every parameter is random, written by stock transformers."""
    sizes = tiny_models._GROUPED | {"head_dim": HEAD_DIM} | settings
    monkeypatch.setitem(tiny_models.VARIANTS, "glm", ("GlmConfig", sizes))
    model = tiny_models.tiny_model("glm")
    model.save_pretrained(path)
    return model


def silence(block: nn.Module, kept_neurons: tuple[int, ...], kept_groups: tuple[int, ...]) -> None:
    """Zero the columns through which a block's removed units would write."""
    heads = [head for group in kept_groups for head in range(group * 3, group * 3 + 3)]
    kept_columns = [head * HEAD_DIM + i for head in heads for i in range(HEAD_DIM)]
    for path, kept in (("mlp.down_proj", kept_neurons), ("self_attn.o_proj", kept_columns)):
        weight = block.get_submodule(path).get_parameter("weight")
        removed = [column for column in range(weight.shape[1]) if column not in set(kept)]
        weight.data[:, removed] = 0


def test_an_example_of_a_family_is_short() -> None:
    assert len(example("add a family").splitlines()) <= 60
    assert "glm" not in FAMILIES


def test_without_the_family_the_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_glm(tmp_path / "model", monkeypatch, {})
    with pytest.raises(ShearlingError, match="'glm', which shearling does not know"):
        Checkpoint.open(tmp_path / "model")


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_family_counts_and_cuts(
    settings: dict[str, Any], tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_glm(tmp_path / "model", monkeypatch, settings)
    checkpoint = Checkpoint.open(tmp_path / "model")
    count = checkpoint.layout.count(checkpoint.shape)
    assert count == sum(parameter.numel() for parameter in model.parameters())
    stored = load_file(tmp_path / "model" / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    assert checkpoint.layout.tensors(checkpoint.shape) == shapes

    per_block = {"mlp": (KEPT_NEURONS,) * 3, "kv_heads": (KEPT_GROUPS,) * 3}
    keep = Keep({"layers": KEPT_BLOCKS}, per_block)
    written = cut(checkpoint, keep, tmp_path / "cut")
    proof = json.loads((tmp_path / "cut" / "shearling.json").read_text())["proof"]
    assert proof["passed"]

    # The stock source in which removed blocks do nothing and removed units write nothing.
    masked = naive.stock_without(tmp_path / "model", set(range(DEPTH)) - set(KEPT_BLOCKS))
    for index in KEPT_BLOCKS:
        silence(naive.blocks(masked)[index], KEPT_NEURONS, KEPT_GROUPS)
    smaller = naive.stock(tmp_path / "cut")
    with torch.no_grad():
        expected = masked(input_ids=ids, use_cache=False).logits
        logits = smaller(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    parameters = sum(parameter.numel() for parameter in smaller.parameters())
    assert written.parameters == parameters < count
