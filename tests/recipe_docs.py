"""The tables of docs/recipes.md: every key of a recipe, and the recipes that are shipped."""

from __future__ import annotations

import re
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from shearling.recipes import schema
from shearling.recipes.read import read_recipe, shipped

# Where a section stands in a recipe, in the order of the page.
SECTIONS: dict[str, type[BaseModel]] = {
    "The recipe": schema.WholeRecipe,
    "`data`": schema.DataSection,
    "`target`": schema.TargetSection,
    "`method`, `kind: scores` or `blocks`": schema.ScoresMethod,
    "`method`, `kind: gates`": schema.GatesMethod,
    "`heal`": schema.HealSection,
    "each of `steps`": schema.StepSection,
    "`evaluate`": schema.EvaluateSection,
    "`bench`": schema.BenchSection,
    "`report`": schema.ReportSection,
}


def with_recipes(page: str) -> str:
    """A page whose tables, between marks, are what the schema and the shipped files say."""
    for name, table in (("keys", keys()), ("shipped", shipped_table())):
        page = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)",
            lambda marks, table=table: marks[1] + table + marks[2],
            page,
            flags=re.DOTALL,
        )
    return page


def keys() -> str:
    """A table for each section."""
    parts = []
    for title, section in SECTIONS.items():
        says = (section.__doc__ or "").strip().splitlines()[0]
        rows = [f"### {title}\n", f"{says}\n", "| key | takes | default | |", "|---|---|---|---|"]
        for name, field in section.model_fields.items():
            default = _default(field)
            rows.append(
                f"| `{name}` | {_takes(field.annotation)} | {default} | {field.description} |"
            )
        parts.append("\n".join(rows) + "\n")
    return "\n" + "\n".join(parts) + "\n"


def shipped_table() -> str:
    """The recipes by name, with what they make of what."""
    rows = ["| recipe | source | what it does |", "|---|---|---|"]
    for name in shipped():
        recipe = read_recipe(name)
        rows.append(f"| `{name}` | {recipe.source} | {recipe.about} |")
    return "\n" + "\n".join(rows) + "\n\n"


def _takes(kind: Any) -> str:
    """A type in words."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "a section"
    words = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    if kind in words:
        return words[kind]
    inner = [one for one in get_args(kind) if one is not NoneType]
    if get_origin(kind) is Literal:
        return ", ".join(f"`{one}`" for one in inner)
    if get_origin(kind) is list:
        return f"list of {_takes(inner[0])}"
    if get_origin(kind) is dict:
        return f"{_takes(inner[1])} by name"
    if hasattr(kind, "__metadata__"):  # Annotated
        return _takes(inner[0])
    return " or ".join(dict.fromkeys(_takes(one) for one in inner))


def _default(field: Any) -> str:
    if field.is_required():
        return "needed"
    default = field.default
    if default is PydanticUndefined or isinstance(default, BaseModel):
        return "its defaults"
    if default in ((), [], ""):
        return "none"
    if isinstance(default, tuple):
        default = list(default)
    words = {None: "none", True: "true", False: "false"}
    return words[default] if default is None or isinstance(default, bool) else f"`{default}`"
