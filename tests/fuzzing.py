"""Damage to files, drawn from a seed, and what reading them then says.

A :class:`Format` writes a valid example and reads it. A mutation of one of its files must be read,
or be refused by one sentence; anything else is a defect. To add a format, write one function that
gives it (see ``own_formats.py``) and name it in a list there. Used by ``test_fuzz.py`` and
``benchmarks/fuzz.py``.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        kind: its name.
        write: writes a valid example into an empty directory.
        read: reads it as the product does; raises where it cannot.
        file: which file of the example is damaged, relative to the directory.
        text: ``json``, ``jsonl`` or, for what is no text, ``bytes``.
    """

    kind: str
    write: Callable[[Path], object]
    read: Callable[[Path], object]
    file: str
    text: str = "json"


@dataclass
class Outcome:
    """What came of the mutations of one format."""

    refused: int = 0
    read: int = 0
    slowest: float = 0.0  # seconds
    tracebacks: list[str] = field(default_factory=list)


DEEP = "a value of many levels"
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**64, -(2**63), 10**400, 0.5, -0.5, 1e308,
    float("nan"), float("inf"), "", "x", "../../x", "\u0000", "\ud800", "a" * 5000,
    [], {}, [[]], [None], [-1], [1.5], ["x"], [{}], {"x": None}, {"": 1}, {"name": 3},
)  # fmt: skip


def attempts(form: Format, count: int, root: Path, seed: int = 0) -> Outcome:
    """Read ``count`` mutations of a format's example, which is made below ``root``."""
    example, damaged = root / "example", root / "damaged"
    example.mkdir(parents=True)
    form.write(example)
    form.read(example)  # which must work
    content = (example / form.file).read_bytes()
    outcome = Outcome()
    for number in range(count):
        draw = random.Random(f"{form.kind} {seed} {number}")
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(example, damaged)
        (damaged / form.file).write_bytes(mutated(content, form.text, draw))
        begun = time.perf_counter()
        try:
            form.read(damaged)
            outcome.read += 1
        except ShearlingError as error:
            said = str(error)
            outcome.refused += 1
            if not said.endswith(".") or "\n" in said or len(said) > 1200:
                outcome.tracebacks.append(f"mutation {number}: no sentence: {said[:200]!r}")
        except Exception as error:
            outcome.tracebacks.append(f"mutation {number}: {type(error).__name__}: {error}"[:300])
        outcome.slowest = max(outcome.slowest, time.perf_counter() - begun)
    return outcome


def mutated(content: bytes, text: str, draw: random.Random) -> bytes:
    """The content with one to three things wrong."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if text == "bytes" or draw.random() < 0.25:
            content = _bytes(content, draw)
        elif text == "jsonl":
            lines = content.split(b"\n")
            index = draw.randrange(len(lines))
            lines[index] = _json(lines[index], draw)
            content = b"\n".join(lines)
        else:
            content = _json(content, draw)
    return content


def _bytes(content: bytes, draw: random.Random) -> bytes:
    """Cut off, flipped, overwritten, emptied, or with something in between."""
    at = draw.randrange(len(content) + 1)
    way = draw.randrange(8)
    if way == 0:
        return content[:at]
    if way == 1:
        return content + draw.randbytes(draw.randrange(1, 40))
    if way == 2:
        return b"" if draw.random() < 0.3 else content[at:]
    if way == 3:
        return (
            content[:at]
            + draw.choice((b"\0" * 9, b"\xff\xfe", b"\n", b"\xed\xa0\x80"))
            + content[at:]
        )
    if way == 4:
        return content[:at] + b"[" * 100_000 + content[at:]
    if way == 5:
        return content[:at] + b"9" * 5_000 + content[at:]
    damaged = bytearray(content)
    for _ in range(draw.choice((1, 2, 8))):
        if damaged:
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
    return bytes(damaged)


def _json(content: bytes, draw: random.Random) -> bytes:
    """A key dropped, doubled or renamed, or a value that is another."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return _bytes(content, draw)
    places = list(_places(value))
    if len(places) > 500:  # deep already
        return _bytes(content, draw)
    if not places or draw.random() < 0.03:
        return _written(draw.choice(VALUES))
    holder, key = draw.choice(places)
    way = draw.randrange(8)
    if way == 0:
        del holder[key]
    elif way == 1 and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif way == 2 and isinstance(holder, list):
        holder.append(holder[key])
    elif way == 3:
        holder[key] = DEEP  # put in as text: Python's own writer stops at a thousand levels
    elif way == 4:
        other, name = draw.choice(places)
        holder[key] = json.loads(json.dumps(other[name]))
    else:
        holder[key] = draw.choice(VALUES)
    depth = draw.choice((10, 40, 300, 900))
    opened, closed = draw.choice((("[", "]"), ('{"parent": ', "}")))
    deep = opened * depth + "1" + closed * depth
    return _written(value).replace(json.dumps(DEEP).encode(), deep.encode())


def _written(value: Any) -> bytes:
    return json.dumps(value).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key) of every value inside, however deep."""
    left = [value]
    while left:
        holder = left.pop()
        if isinstance(holder, dict | list):
            for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
                yield holder, key
                left.append(holder[key])
