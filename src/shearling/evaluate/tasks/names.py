"""Which tasks lm-eval has, told by its files as text: its own index takes half a minute."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from shearling.errors import ShearlingError

NEAR, SHOWN = 0.7, 3  # of difflib's ratio, the least that is near; how many names are shown
_NAMED = re.compile(
    rb"""^['"]?(?:task|group)['"]?[ \t]*:[ \t]*['"]?([\w.\-]+)['"]?[ \t]*\r?$""", re.MULTILINE
)


def check_known(names: Iterable[str]) -> None:
    """Refuse names that stand in none of lm-eval's files, before these are read as what they are.

    One that stands there may still be no task; lm-eval's own index says so later.

    Raises:
        ShearlingError: a name that is nowhere, with those that are near to it.
    """
    texts = None
    for name in names:
        texts = texts or _texts()
        if texts and name.encode() not in texts:
            raise unknown(name, {found.decode() for found in _NAMED.findall(texts)})


def unknown(name: str, known: Iterable[str]) -> ShearlingError:
    """That there is no such task, and which names are near in spelling."""
    near = difflib.get_close_matches(name, sorted(known), n=SHOWN, cutoff=NEAR)
    nearest = f"; the nearest are {', '.join(near)}" if near else ""
    return ShearlingError(
        f"lm-eval {version('lm_eval')} has no task {name!r}{nearest}; give one that it has, or a "
        ".jsonl file of questions."
    )


@cache
def _texts() -> bytes:
    """The YAML files of lm-eval's tasks and what these include, some of it without a suffix."""
    found = find_spec("lm_eval")
    places = found.submodule_search_locations if found is not None else None
    return b"\n".join(
        file.read_bytes()
        for place in places or ()
        for file in sorted(Path(place, "tasks").rglob("*"))
        if (not file.suffix or "yaml" in file.name) and file.is_file()
    )
