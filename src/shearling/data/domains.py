"""The files of every domain, out of what the user gave."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shearling.data.records import SUFFIXES, suffix_of
from shearling.data.results import DOMAIN
from shearling.errors import ShearlingError


@dataclass(frozen=True)
class Source:
    """A file, and what it is called in a manifest: its path below what the user named."""

    file: Path
    name: str


def find_domains(specs: Sequence[str]) -> dict[str, list[Source]]:
    """The files of every domain, by its name, names and files sorted.

    Args:
        specs: what the user gave, each a domain: ``NAME=PATH`` or a path, where a path is a file,
            a directory or a glob pattern. Without a name, a file is called by its stem and a
            directory by its own name; a pattern without a name stands for the paths it matches.

    Raises:
        ShearlingError: nothing is there, a file has another suffix, a directory holds nothing
            that is read, a name cannot be a directory, or two domains have the same.
    """
    domains: dict[str, list[Source]] = {}
    for spec in specs:
        name, pattern = _split(spec)
        paths = _matches(pattern)
        for chosen, group in [(name, paths)] if name else [(_name_of(p), [p]) for p in paths]:
            if not DOMAIN.fullmatch(chosen):
                raise ShearlingError(
                    f"{spec!r} would make a domain called {chosen!r}, but a name has letters, "
                    f"digits, '_', '-' and '.' only; give it as NAME={pattern}."
                )
            if chosen.casefold() in map(str.casefold, domains):
                raise ShearlingError(
                    f"two domains are called {chosen!r}; name them apart as NAME=PATH, or give "
                    "all the files of one domain as one directory or one glob."
                )
            domains[chosen] = _sources(group)
    if not domains:
        raise ShearlingError("no files were given; give NAME=PATH or a path for every domain.")
    return dict(sorted(domains.items()))


def _split(spec: str) -> tuple[str | None, str]:
    """Name and path; a path that exists may hold a "=" itself."""
    name, equals, path = spec.partition("=")
    if equals and "/" not in name and not Path(spec).exists():
        return name, path
    return None, spec


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.exists():
        return [path]
    matches = sorted(map(Path, glob.glob(str(path), recursive=True)))
    if not matches:
        raise ShearlingError(
            f"There is no text at {pattern}; give an existing directory, a glob that matches, or "
            f"a file ending in {', '.join(SUFFIXES)}."
        )
    return matches


def _name_of(path: Path) -> str:
    if path.is_dir():
        return path.resolve().name
    return path.name[: -len(suffix)] if (suffix := suffix_of(path)) else path.stem


def _sources(paths: Sequence[Path]) -> list[Source]:
    """The files of one domain, each once, sorted by what they are called."""
    by_file: dict[Path, Source] = {}
    for path in paths:
        if path.is_dir():
            below = [
                Source(file, file.relative_to(path).as_posix())
                for file in path.rglob("*")
                if suffix_of(file) and file.is_file() and not _hidden(file.relative_to(path))
            ]
            if not below:
                raise ShearlingError(
                    f"The directory {path} holds no text; give one with files ending in "
                    f"{', '.join(SUFFIXES)}."
                )
            names = [(f"{path.name}/{s.name}" if len(paths) > 1 else s.name, s) for s in below]
            by_file |= {s.file.resolve(): Source(s.file, name) for name, s in names}
        elif not suffix_of(path):
            raise ShearlingError(
                f"{path} is not a kind of text file that is read here; give a file ending in "
                f"{', '.join(SUFFIXES)}, or a directory of such."
            )
        else:
            by_file[path.resolve()] = Source(path, path.name)
    return sorted(by_file.values(), key=lambda source: (source.name, str(source.file)))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
