"""A command as a function of one frozen value: its options are a dataclass, read here for typer.

typer reads a command's options from the parameters of a function. Ours stand in a frozen dataclass
instead, a field an option, so that they can be handed on as one value::

    @dataclass(frozen=True, kw_only=True)
    class InspectOptions:
        model: Model
        as_json: Json = False


    @takes_options
    def inspect(options: InspectOptions) -> None: ...

A field whose type is such a dataclass itself is a group: its options take its place. Their defaults
are those of the group, or of the field's default if it has one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from inspect import Parameter, Signature
from typing import Any, TypeVar, get_type_hints

from shearling.errors import ShearlingError

Options = TypeVar("Options")


def takes_options(command: Callable[[Options], None]) -> Callable[..., None]:
    """A function with an argument for every option, which hands ``command`` all as one value.

    Args:
        command: a function of one argument, ``options``, whose annotation is a dataclass.
    """
    kind = get_type_hints(command)["options"]
    parameters = list(_parameters(kind))

    def run(**given: Any) -> None:
        from shearling.files.scratch import sweep_all

        _check_floats(given)
        sweep_all()
        command(_gathered(kind, given))

    for name in ("__name__", "__qualname__", "__doc__", "__module__"):
        setattr(run, name, getattr(command, name))
    run.__signature__ = Signature(parameters, return_annotation=None)  # ty: ignore
    run.__annotations__ = {one.name: one.annotation for one in parameters} | {"return": None}
    return run


def _check_floats(given: Mapping[str, Any]) -> None:
    """Refuse infinity and NaN, which typer reads as numbers and no option means."""
    for name, value in given.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ShearlingError(
                f"--{name.replace('_', '-')} {value} was given, but a finite number was expected."
            )


def _parameters(kind: Any, default: Any = None) -> Iterator[Parameter]:
    """An argument for each option, in the order in which help lists them."""
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        preset = field.default if default is None else getattr(default, field.name)
        if is_dataclass(hints[field.name]):
            yield from _parameters(hints[field.name], None if preset is MISSING else preset)
        else:
            preset = Parameter.empty if preset is MISSING else preset
            yield Parameter(
                field.name, Parameter.KEYWORD_ONLY, default=preset, annotation=hints[field.name]
            )


def _gathered(kind: Any, given: Mapping[str, Any]) -> Any:
    """The options' value; an option that was not given has its default already."""
    hints = get_type_hints(kind)
    return kind(
        **{
            field.name: _gathered(hints[field.name], given)
            if is_dataclass(hints[field.name])
            else given[field.name]
            for field in fields(kind)
        }
    )
