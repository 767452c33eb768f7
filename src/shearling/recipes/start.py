"""A recipe from four answers: which model, which text, how small or how fast, which machine."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shearling.data.domains import find_domains
from shearling.engine.devices import num_gpus
from shearling.errors import ShearlingError
from shearling.files.reading import parse_yaml
from shearling.model.checkpoint import Checkpoint
from shearling.recipes.read import recipe_of, shipped
from shearling.recipes.target import size_of

MACHINES = {"cpu": "laptop", "gpu": "shearling"}  # the shipped recipe that each begins with
_FASTER = re.compile(r"(\d+(?:\.\d+)?)\s*x?\s*faster", re.IGNORECASE)
_BLOCKS = re.compile(r"(\d+)\s*(?:blocks|layers)", re.IGNORECASE)


@dataclass(frozen=True)
class RecipeAnswers:
    """What is asked.

    Attributes:
        model: a directory, a ``.gguf`` file or a hub id.
        text: files, directories or globs, as ``shearling pack`` takes them.
        size: ``0.8x`` or ``113M`` (parameters), ``24 blocks``, or ``1.3x faster``.
        machine: ``cpu``, ``gpu``, or ``auto``: a GPU if there is one.
    """

    model: str
    text: tuple[str, ...]
    size: str
    machine: str = "auto"


def recipe_text(answers: RecipeAnswers, directory: Path) -> str:
    """The recipe as YAML, checked; its paths are relative to ``directory``, where it will lie.

    Raises:
        ShearlingError: an answer that cannot be used: no model, no text, a size that no shape of
            the model meets, an unknown machine.
    """
    name = _shipped(answers.machine)
    model = Checkpoint.open(answers.model)
    find_domains(answers.text)
    target, method = _wanted(answers.size, model)
    values: dict[str, Any] = parse_yaml(shipped()[name], f"The recipe {name}")
    values |= {"about": f"{model.name}, {answers.size}; begun from the shipped recipe {name}."}
    values |= {"source": _relative(answers.model, directory), "target": target, "method": method}
    text = [_spec(one, directory) for one in answers.text]
    values["data"] = dict(values["data"]) | {"text": text[0] if len(text) == 1 else text}
    recipe = recipe_of(values, "of these answers")
    assert recipe.target is not None
    size_of(recipe.target, model, model, depth_only=method["kind"] == "blocks")
    head = (
        "# Run it with `shearling run FILE --output DIR`; with --dry-run it says what it takes.\n"
        "# docs/recipes.md explains every key. Paths are relative to this file.\n"
    )
    return head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=90)


def _shipped(machine: str) -> str:
    """The shipped recipe for a machine."""
    if machine == "auto":
        machine = "gpu" if num_gpus() else "cpu"
    if machine not in MACHINES:
        raise ShearlingError(
            f"--machine {machine!r} was given, but {', '.join(MACHINES)} or auto was expected."
        )
    return MACHINES[machine]


def _wanted(size: str, model: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """Target and method.

    Time for a token is nearly in proportion to the blocks that it passes, and hardly to their
    width where one token is decoded at a time: who asks for speed gets whole blocks removed.
    """
    depth = model.shape["layers"]
    if faster := _FASTER.fullmatch(size.strip()):
        times = float(faster[1])
        layers = int(depth / times) if times > 1 else depth
        if not 0 < layers < depth:
            raise ShearlingError(
                f"--size {size!r} would leave {layers} of {depth} blocks; give such as 1.3x faster."
            )
        return {"layers": layers}, {"kind": "blocks"}
    if blocks := _BLOCKS.fullmatch(size.strip()):
        return {"layers": int(blocks[1])}, {"kind": "blocks"}
    return {"params": size.strip()}, {"kind": "scores"}


def _spec(given: str, directory: Path) -> str:
    """A domain's path, or ``NAME=PATH``, relative to the recipe."""
    name, equals, path = given.partition("=")
    if equals and "/" not in name and not Path(given).exists():
        return f"{name}={_moved(path, directory)}"
    return _moved(given, directory)


def _relative(model: str, directory: Path) -> str:
    """A model's path relative to the recipe; a hub id stays."""
    return _moved(model, directory) if Path(model).exists() else model


def _moved(path: str, directory: Path) -> str:
    if Path(path).is_absolute() or path.startswith("~"):
        return path
    return os.path.relpath(path, directory)
