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
_NUMBER = r"\s*([0-9.]+)\s*"
_FASTER = re.compile(_NUMBER + r"x?\s*faster\s*", re.IGNORECASE)
_MEMORY = re.compile(_NUMBER + r"(?:x\s*(?:of\s*)?(?:the\s*)?memory|([KMGT]i?B))\s*", re.IGNORECASE)
_LATENCY = re.compile(_NUMBER + r"(ms|s)\s*", re.IGNORECASE)
_BLOCKS = re.compile(r"\s*(\d+)\s*(?:blocks|layers)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class RecipeAnswers:
    """What is asked.

    Attributes:
        model: a directory, a ``.gguf`` file or a hub id.
        text: files, directories or globs, as ``shearling pack`` takes them.
        size: ``0.8x`` or ``113M`` (parameters), ``24 blocks``, ``1.3x faster``, ``20ms`` (for a
            token), ``0.7x memory`` or ``8GB`` (weights and cache).
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
    target, method = _wanted(answers.size)
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


def _wanted(size: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Target and method; a speed, a latency or a memory is a target that the plan meets."""
    if blocks := _BLOCKS.fullmatch(size):
        return {"layers": int(blocks[1])}, {"kind": "blocks"}
    if faster := _FASTER.fullmatch(size):
        target = {"speed": f"{faster[1]}x"}
    elif memory := _MEMORY.fullmatch(size):
        target = {"footprint": f"{memory[1]}{memory[2] or 'x'}"}
    elif latency := _LATENCY.fullmatch(size):
        target = {"latency": f"{latency[1]}{latency[2]}"}
    else:
        target = {"params": size.strip()}
    return target, {"kind": "scores"}


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
