"""From a file, or the name of a shipped recipe, and ``key=value`` pairs to a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from shearling.errors import ShearlingError, misfit, nearest
from shearling.files.reading import check_size, parse_yaml
from shearling.recipes.schema import VERSION, WholeRecipe
from shearling.train.options import pairs_into

# Keys whose values are paths; those of the second kind may be something else.
PATHS = ("text", "store", "calibration")
PERHAPS = ("source", "suite")


def shipped() -> dict[str, str]:
    """The recipes that come with shearling: name -> YAML."""
    return {
        file.name.removesuffix(".yaml"): file.read_text("utf-8")
        for file in sorted(files("shearling.recipes").iterdir(), key=lambda one: one.name)
        if file.name.endswith(".yaml")
    }


def read_recipe(
    name: str, pairs: Sequence[str] = (), changes: Mapping[str, Any] | None = None
) -> WholeRecipe:
    """A recipe with what was changed of it.

    Paths in a file are relative to the file, those of pairs and of shipped recipes to the working
    directory.

    Args:
        name: a YAML file, or a shipped recipe.
        pairs: ``key=value``; ``data.length=1024`` reaches inside, ``heal.0.lr=1e-4`` into a list.
        changes: values by dotted key that take the place of what is there.

    Raises:
        ShearlingError: no such recipe, one of a newer version, or the first mistake in it: an
            unknown key names the nearest there is.
    """
    values, base = _values(name)
    _check_version(values, name)
    values = pairs_into(_located(values, base), pairs)
    for key, value in (changes or {}).items():
        *inside, last = key.split(".")
        target = values
        for part in inside:
            target[part] = dict(target.get(part) or {})
            target = target[part]
        target[last] = value
    return recipe_of(_located(values, Path()), name)


def recipe_of(values: Mapping[str, Any], name: str) -> WholeRecipe:
    """A recipe of plain values (ShearlingError for the first that does not fit)."""
    try:
        return WholeRecipe.model_validate(values)
    except ValidationError as error:
        raise ShearlingError(_sentence(error, name)) from error


def plain_recipe(recipe: WholeRecipe) -> dict[str, Any]:
    """What was said in a recipe, as plain values."""
    return {"shearling": VERSION} | recipe.model_dump(mode="json", exclude_unset=True)


def _values(name: str) -> tuple[dict[str, Any], Path]:
    """What a recipe says, and where its paths begin."""
    path, ours = Path(name), shipped()
    if path.is_file():
        check_size(path)
        try:
            text, base = path.read_text("utf-8"), path.resolve().parent
        except UnicodeDecodeError as error:
            raise ShearlingError(
                f"The recipe {path} is not UTF-8 text; give a YAML file."
            ) from error
    elif name in ours:
        text, base = ours[name], Path().resolve()
    else:
        raise ShearlingError(
            f"{name} is neither a recipe file nor a shipped recipe{nearest(name, ours)}; shipped "
            f"are {', '.join(ours)}."
        )
    values = parse_yaml(text, f"The recipe {name}")
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ShearlingError(
            f"The recipe {name} is not a mapping; give source:, data:, target: and the like "
            "(`shearling init` writes one)."
        )
    return values, base


def _check_version(values: Mapping[str, Any], name: str) -> None:
    """Raise ShearlingError unless a recipe is of this form."""
    version = values.get("shearling")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ShearlingError(
            f"The recipe {name} does not say which form it has; begin it with `shearling: "
            f"{VERSION}`."
        )
    if version > VERSION:
        raise ShearlingError(
            f"The recipe {name} is of version {version}, but this program reads version {VERSION}; "
            "install a newer shearling."
        )


def _located(values: Any, base: Path, key: str = "") -> Any:
    """The same values with paths that do not depend on the working directory."""
    if isinstance(values, dict):
        inside = key if key in ("text", "calibration") else None  # domains, or sources
        return {name: _located(one, base, inside or str(name)) for name, one in values.items()}
    if isinstance(values, list):
        return [_located(one, base, key) for one in values]
    if not isinstance(values, str):
        return values
    if key in PATHS:
        return _placed(values, base)
    if key in PERHAPS and (base / values).exists():
        return str((base / values).resolve())
    return values


def _placed(path: str, base: Path) -> str:
    """An absolute path, or ``NAME=PATH`` with one."""
    name, equals, inside = path.partition("=")
    if equals and "/" not in name and not (base / path).exists():
        return f"{name}={_placed(inside, base)}"
    return str(base.resolve() / Path(path).expanduser())


def _sentence(error: ValidationError, name: str) -> str:
    """The first mistake of a recipe in words."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if part not in ("scores", "blocks", "gates")]
    where = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = _fields(path[:-1])
        return (
            f"The recipe {name} has the key {where}, which is not known"
            f"{nearest(path[-1], known)}; the keys there are {', '.join(known)}."
        )
    if first["type"] == "missing":
        return f"The recipe {name} lacks the key {where}."
    return f"The recipe {name} cannot be used{f' at {where}' if where else ''}: {misfit(first)}."


def _fields(path: Sequence[str]) -> list[str]:
    """The keys of the section to which a path leads; of a method, those of all kinds."""
    sections: list[type[BaseModel]] = [WholeRecipe]
    for part in path:
        if part.isdecimal():
            continue
        held = [section.model_fields[part] for section in sections if part in section.model_fields]
        sections = [one for field in held for one in _sections(field.annotation)]
    return list(dict.fromkeys(name for section in sections for name in section.model_fields))


def _sections(kind: Any) -> list[type[BaseModel]]:
    """The sections that a type holds, however deep."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [one for inner in get_args(kind) for one in _sections(inner)]
