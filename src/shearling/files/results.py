"""Files of ours: every kind is one frozen dataclass that writes, reads and documents itself.

A class states its ``kind``, who writes it, and its fields with their types; :func:`entry` adds what
a field means and what is read where an older file does not have it. From that come
:meth:`OwnFile.to_json`, :meth:`OwnFile.from_json` and the lists of docs/files.md. What makes a
file impossible although every type is right, a class says itself (:class:`Misfit`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path, PureWindowsPath
from types import NoneType
from typing import (
    Annotated,
    Any,
    ClassVar,
    NoReturn,
    Self,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from shearling.errors import ShearlingError
from shearling.version import __version__

T = TypeVar("T")

# What to call something: a text, or an object's ``name``; of an absolute path only its last part.
# Of any other Annotated type the second part is what an error says was expected.
Name = Annotated[str, "a name"]
EXPECTED = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
LONGEST = 60  # characters of a value that an error shows
AGAIN = "write the file again with the shearling command that made it, or move it away"
DEEPEST = 32  # levels of a value that may be anything: what shows it walks down them
LARGEST_COUNT = 2**64  # a seed may have 64 bits; nothing else comes near


class Misfit(ValueError):
    """A value that its type allows and its class does not; reading turns it into a ShearlingError.

    Args:
        where: how to get to it from the object, such as ``looks[2].losses.c4``.
        expected: what belongs there.
        given: what is there; left out where nothing is.
    """

    def __init__(self, where: str, expected: str, given: Any = MISSING) -> None:
        """Say what is wrong."""
        super().__init__(f"{where} is {_shown(given)} where {expected} was expected")
        self.where, self.expected, self.given = where, expected, given


class UnfitFile(ShearlingError):
    """A file that cannot be used: which, why, and what would work."""

    def __init__(self, path: Path, reason: str, advice: str) -> None:
        """Make the sentence."""
        super().__init__(f"{path}: {reason}; {advice}.")
        self.reason = reason


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def entry(
    says: str = "", *, absent: Any = MISSING, omit: bool = False, by_name: bool = True
) -> Any:
    """A field of a result.

    Args:
        says: what it holds, for docs/files.md.
        absent: read where a file does not have it, or has null; without, it has to be there.
        omit: whether it is left out of the file where it is ``absent``.
        by_name: whether one that may be ``absent`` is given to the class by its name alone.
    """
    told = {"says": says, "absent": absent, "omit": omit}
    if absent is MISSING:
        return field(metadata=told)
    if isinstance(absent, dict):
        return field(default_factory=lambda: dict(absent), metadata=told, kw_only=by_name)
    return field(default=absent, metadata=told, kw_only=by_name)


@dataclass(frozen=True, kw_only=True)
class OwnFile:
    """What every kind says of itself; see docs/files.md."""

    kind: ClassVar[str]
    written_by: ClassVar[str]
    advice: ClassVar[str] = AGAIN  # what would work in place of a damaged file

    def to_json(self) -> dict[str, Any]:
        """The file's content, ``kind`` first, then the fields in their order."""
        return {"kind": self.kind} | plain(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], path: Path, inside: str = "") -> Self:
        """A file's content; keys that the class does not have are passed over.

        Args:
            values: the object.
            path: of the file, for messages.
            inside: where in the file the object stands, a dot at the end; "" for all of it.

        Raises:
            ShearlingError: a field is missing or is not what it should be; it names the file
                ``path``, the field, what stands there and what was expected.
        """
        try:
            return _read_object(cls, values, path, inside)
        except UnfitFile as error:
            raise UnfitFile(path, error.reason, cls.advice) from error
        except RecursionError as error:
            raise ShearlingError(
                f"{path} is nested too deeply to be read as {cls.kind}; {cls.advice}."
            ) from error


@dataclass(frozen=True, kw_only=True)
class ResultFile(OwnFile):
    """A result: it says when it was written, and by which version."""

    # Neither tells two results apart: they compare by what was measured.
    shearling: str = field(default=__version__, compare=False, metadata={"absent": ""})
    created: str = field(default_factory=now, compare=False, metadata={"absent": ""})


def read_object(of: type[T], values: Mapping[str, Any], path: Path, inside: str = "") -> T:
    """A dataclass from a part of a file, such as a line of it; see :meth:`OwnFile.from_json`.

    Raises:
        ShearlingError: as there.
    """
    try:
        return _read_object(of, values, path, inside)
    except RecursionError as error:
        raise ShearlingError(f"{path} is nested too deeply to be read; {AGAIN}.") from error


def plain(value: Any) -> Any:
    """A dataclass, or what lies in one, as JSON knows it."""
    if dataclasses.is_dataclass(value):
        written = {}
        for one in dataclasses.fields(value):
            held = getattr(value, one.name)
            if not (one.metadata.get("omit") and held == one.metadata["absent"]):
                written[one.name] = plain(held)
        return written
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def public(text: str) -> str:
    """A text fit to be shown to others: of an absolute path only the last part."""
    if text.startswith("/") or PureWindowsPath(text).drive:
        return PureWindowsPath(text).name or text
    return text


def refuse(path: Path, where: str, expected: str, given: Any = MISSING) -> NoReturn:
    """Say that a file cannot be used, and what would write it anew."""
    where = where if len(where) <= 2 * LONGEST else where[: 2 * LONGEST - 3] + "..."
    raise UnfitFile(path, f"{where} is {_shown(given)} where {expected} was expected", AGAIN)


def _shown(given: Any) -> str:
    shown = "missing" if given is MISSING else _repr(given)
    return shown if len(shown) <= LONGEST else shown[: LONGEST - 3] + "..."


def _repr(given: Any) -> str:
    """As Python writes it, without writing all of what is large."""
    if isinstance(given, dict | list) and _depth(given) > DEEPEST:
        return f"a deeply nested {'object' if isinstance(given, dict) else 'list'}"
    if isinstance(given, list):
        given = given[:LONGEST]
    return repr(given)


@cache
def _types(of: type) -> dict[str, Any]:
    return get_type_hints(of, include_extras=True)


def _read_object(of: type[Any], values: Mapping[str, Any], path: Path, inside: str) -> Any:
    """An instance of a dataclass; ``inside`` is how to get to it, with a dot at the end."""
    read = {}
    for one in dataclasses.fields(of):
        wanted, absent = _types(of)[one.name], one.metadata.get("absent", MISSING)
        value = values.get(one.name, MISSING)
        if absent is not MISSING and (value is MISSING or value is None):
            read[one.name] = absent
        else:
            read[one.name] = _read(wanted, value, path, inside + one.name)
    try:
        return of(**read)
    except Misfit as misfit:
        refuse(path, inside + misfit.where, misfit.expected, misfit.given)


def _read(wanted: Any, value: Any, path: Path, where: str) -> Any:
    """A value as the type that a field has."""
    if wanted is Any and value is not MISSING:
        if _depth(value) > DEEPEST:
            refuse(path, where, f"a value of at most {DEEPEST} levels", value)
        return value
    if wanted is Name:
        return _name(value, path, where)
    if get_origin(wanted) is Annotated:
        inner, expected = get_args(wanted)
        try:
            return _read(inner, value, path, where)
        except ShearlingError:
            refuse(path, where, expected, value)
    if NoneType in get_args(wanted):
        (inner,) = (one for one in get_args(wanted) if one is not NoneType)
        return None if value is None else _read(inner, value, path, where)
    if dataclasses.is_dataclass(wanted) and isinstance(wanted, type):
        if not isinstance(value, dict):
            refuse(path, where, "an object", value)
        return _read_object(wanted, value, path, where + ".")
    if get_origin(wanted) is tuple:
        return _list(get_args(wanted), value, path, where)
    if get_origin(wanted) is dict:
        if not isinstance(value, dict):
            refuse(path, where, "an object", value)
        inner = get_args(wanted)[1]
        return {key: _read(inner, one, path, f"{where}.{key}") for key, one in value.items()}
    if not _is(wanted, value):
        refuse(path, where, EXPECTED.get(wanted, "a value"), value)
    return _float(value, path, where) if wanted is float else value


def _float(value: float, path: Path, where: str) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        refuse(path, where, "a number below 1e308", value)


def _depth(value: Any) -> int:
    """Levels of lists and objects, counted no further than one more than may be."""
    level, held = 0, [value]
    while held and level <= DEEPEST:
        inside = [one for one in held if isinstance(one, dict | list)]
        held = [two for one in inside for two in (one.values() if isinstance(one, dict) else one)]
        level += bool(inside)
    return level


def _is(wanted: Any, value: Any) -> bool:
    """Whether a value is of a plain type; infinities and NaN are numbers, they are results too."""
    if wanted in (str, bool):
        return isinstance(value, wanted)
    if isinstance(value, bool):
        return False
    if wanted is int:
        return isinstance(value, int) and 0 <= value < LARGEST_COUNT
    return isinstance(value, int | float)


def _list(inner: tuple[Any, ...], value: Any, path: Path, where: str) -> tuple[Any, ...]:
    """A list of any length, or of as many values as a tuple's type names."""
    if not isinstance(value, list):
        refuse(path, where, "a list", value)
    if Ellipsis not in inner:
        if len(value) != len(inner):
            refuse(path, where, f"a list of {len(inner)} values", value)
        types = inner
    else:
        types = (inner[0],) * len(value)
    if inner[0] is float:  # null stands for NaN, which JSON cannot say
        value = [math.nan if one is None else one for one in value]
    return tuple(
        _read(one, held, path, f"{where}[{index}]")
        for index, (one, held) in enumerate(zip(types, value, strict=True))
    )


def _name(value: Any, path: Path, where: str) -> str:
    called = value
    if isinstance(value, dict):
        called = value.get("name") or ", ".join(f"{key} {one}" for key, one in value.items())
    if not isinstance(called, str) or not called:
        refuse(path, where, "a name", value)
    return public(called)


def documented(of: type[Any], depth: int = 0) -> Iterator[str]:
    """The fields of a kind as lines of a Markdown list, objects inside it indented below it."""
    stamped = {one.name for one in dataclasses.fields(ResultFile)}
    for one in dataclasses.fields(of):
        if one.name in stamped:  # said once, of all kinds
            continue
        wanted = _types(of)[one.name]
        says, absent = one.metadata.get("says", ""), one.metadata.get("absent", MISSING)
        old = "; may be absent" if absent is not MISSING else ""
        yield f"{'    ' * depth}- `{one.name}` ({_word(wanted)}{old}){': ' + says if says else ''}"
        inner = _inner(wanted)
        if inner is not None and inner.__name__ != "ModelRef":
            yield from documented(inner, depth + 1)


def _inner(wanted: Any) -> type[Any] | None:
    """The dataclass that a type holds, however deep."""
    if isinstance(wanted, type) and dataclasses.is_dataclass(wanted):
        return wanted
    return next((held for one in get_args(wanted) if (held := _inner(one)) is not None), None)


def _word(wanted: Any, many: bool = False) -> str:
    """What JSON calls a type."""
    if get_origin(wanted) is Annotated and wanted is not Name:
        return _word(get_args(wanted)[0], many)
    if NoneType in get_args(wanted):
        return (
            f"{_word(next(one for one in get_args(wanted) if one is not NoneType), many)} or null"
        )
    if get_origin(wanted) is tuple:
        inner = get_args(wanted)
        count = "" if Ellipsis in inner else f"{len(inner)} "
        return f"{'lists' if many else 'list'} of {count}{_word(inner[0], True)}"
    if get_origin(wanted) is dict:
        return f"{'objects' if many else 'object'} of {_word(get_args(wanted)[1], True)} by name"
    words = {str: "text", Name: "text", int: "whole number", float: "number", Any: "any value"}
    if wanted is bool:
        return "true or false"
    return words.get(wanted, "object") + ("s" if many else "")
