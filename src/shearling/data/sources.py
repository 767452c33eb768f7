"""The texts that a model is calibrated on: where they lie, what they are called, their shares.

Windows are dealt out over the sources by share, and stand in an order that mixes them evenly: the
first few see every source in its share, and so do those that a repair holds out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from shearling.data.records import SUFFIXES, suffix_of
from shearling.data.results import DOMAIN
from shearling.engine.moments import HELD_OUT
from shearling.errors import ShearlingError, count_of

TOLERANCE = 1e-6  # by which shares may miss 1
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class TextSource:
    """One of the texts.

    Attributes:
        file: .jsonl, .txt or .parquet, or a directory of such.
        name: what it is called in results; the only source needs none.
        share: of the windows; None shares them out evenly.
    """

    file: Path
    name: str = ""
    share: float | None = None

    @staticmethod
    def parse(text: str) -> TextSource:
        """A source as a user writes it: PATH, or NAME=PATH, with :SHARE behind or without.

        A path that exists is one, whatever signs it holds.

        Raises:
            ShearlingError: nothing is there, or the name or the share cannot be one.
        """
        if Path(text).exists():
            return TextSource(Path(text))
        name, equals, rest = text.partition("=")
        if not equals or "/" in name:
            name, rest = "", text
        elif not DOMAIN.fullmatch(name):
            raise ShearlingError(
                f"{text!r} would make a calibration source called {name!r}, but a name has "
                f"letters, digits, '_', '-' and '.' only; give it as NAME={rest}."
            )
        path, share = rest, None
        before, colon, after = rest.rpartition(":")
        if colon and (_NUMBER.fullmatch(after) or Path(before).expanduser().exists()):
            path, share = (rest, None) if Path(rest).expanduser().exists() else (before, after)
        if not path or not Path(path).expanduser().exists():
            raise ShearlingError(
                f"There is no text at {path or repr(text)}; give an existing directory or a file "
                f"ending in {', '.join(SUFFIXES)}, one as PATH or several as NAME=PATH:SHARE."
            )
        if share is not None and not _NUMBER.fullmatch(share):
            raise ShearlingError(
                f"{text!r} gives {share!r} as a share, but a number was expected, such as "
                f"{path}:0.5."
            )
        return TextSource(Path(path).expanduser(), name, None if share is None else float(share))


def parse_sources(texts: Sequence[str]) -> tuple[TextSource, ...]:
    """Sources as a user writes them; see :meth:`TextSource.parse` and :func:`settled_sources`."""
    return settled_sources([TextSource.parse(text) for text in texts])


def settled_sources(given: Path | Sequence[TextSource]) -> tuple[TextSource, ...]:
    """The same, checked, each with a share; one of several without a name has that of its file.

    Raises:
        ShearlingError: none is given, two have one name, a share is not above 0, some have shares
            and others not, or shares do not sum to 1.
    """
    sources = [TextSource(Path(given))] if isinstance(given, str | Path) else list(given)
    if not sources:
        raise ShearlingError("no calibration source was given; give at least one file.")
    if len(sources) > 1:
        sources = [one if one.name else replace(one, name=_called(one.file)) for one in sources]
    by_name: dict[str, TextSource] = {}
    for one in sources:
        other = by_name.setdefault(one.name.casefold(), one)
        if other is not one:
            raise ShearlingError(
                f"two calibration sources are called {one.name!r} ({other.file} and {one.file}); "
                "name them apart as NAME=PATH."
            )
    return tuple(_shared(sources))


def described_sources(sources: Sequence[TextSource], samples: int) -> dict[str, Any]:
    """For results: the name of the only file, or all sources with their windows."""
    if len(sources) == 1 and not sources[0].name:
        return {"file": sources[0].file.name}
    windows = dealt(sources, samples)
    return {
        "sources": [
            {"name": one.name, "file": one.file.name, "share": one.share, "windows": count}
            for one, count in zip(sources, windows, strict=True)
        ]
    }


def dealt(sources: Sequence[TextSource], samples: int) -> list[int]:
    """How many of so many windows each source gives: by largest remainder, the first of equals.

    Raises:
        ShearlingError: a source would give none.
    """
    shares = exact_shares(sources)
    counts = by_largest_remainder(shares, samples)
    if 0 in counts:
        least = sources[counts.index(0)]
        enough = math.ceil(1 / min(shares))
        raise ShearlingError(
            f"of {count_of(samples, 'calibration window')} none would be of {least.name}, "
            f"whose share is {least.share:g}; give every source at least one, "
            f"with --samples {enough} or more, or a larger share."
        )
    return counts


def by_largest_remainder(shares: Sequence[Fraction], seats: int) -> list[int]:
    """Whole numbers that sum to ``seats`` and stand nearest to ``shares``, which sum to 1."""
    wanted = [share * seats for share in shares]
    counts = [math.floor(one) for one in wanted]
    nearest_first = sorted(range(len(shares)), key=lambda i: counts[i] - wanted[i])
    for i in nearest_first[: seats - sum(counts)]:
        counts[i] += 1
    return counts


def mixed_order(counts: Sequence[int], seed: int) -> tuple[int, ...]:
    """The source of each window, so many of each, evenly mixed.

    Window by window that source is next which is furthest behind its share, among all windows and
    among those of this window's kind: held out by a repair, or not. A draw decides between
    equals, so that no period of the order meets one of whoever takes every so manieth.
    """
    total, sources = sum(counts), range(len(counts))
    rng = np.random.default_rng(seed)
    taken, of_kind = [0] * len(counts), [[0] * len(counts), [0] * len(counts)]
    order: list[int] = []
    for place in range(total):
        kind = of_kind[place % HELD_OUT == HELD_OUT - 1]
        left = [i for i in sources if taken[i] < counts[i]]
        behind = {
            i: 2 * ((place + 1) * counts[i] - taken[i] * total)
            + 3 * ((sum(kind) + 1) * counts[i] - kind[i] * total)
            for i in left
        }
        furthest = max(behind.values())
        equals = [i for i in left if behind[i] == furthest]
        chosen = equals[int(rng.integers(len(equals)))]
        taken[chosen] += 1
        kind[chosen] += 1
        order.append(chosen)
    return tuple(order)


def _called(file: Path) -> str:
    """A file's name without its suffix, or a directory's."""
    return file.name[: -len(suffix)] if (suffix := suffix_of(file)) else file.resolve().name


def exact_shares(sources: Sequence[TextSource]) -> list[Fraction]:
    """Shares as they were written, so that a tenth is one; they sum to 1."""
    shares = [Fraction(1 if one.share is None else repr(one.share)) for one in sources]
    return [share / sum(shares) for share in shares]


def _shared(sources: list[TextSource]) -> list[TextSource]:
    """Sources with a share each (ShearlingError as :func:`settled_sources`)."""
    shares = {one.name: one.share for one in sources if one.share is not None}
    for name, share in shares.items():
        if not (math.isfinite(share) and share > 0):
            raise ShearlingError(
                f"calibration source {name or sources[0].file} has share {share:g}, but a share "
                "is above 0; leave the source out, or give it a larger one."
            )
    if not shares:
        return [replace(one, share=1 / len(sources)) for one in sources]
    total = math.fsum(shares.values())
    summed = " + ".join(f"{share:g}" for share in shares.values())
    without = [one.name for one in sources if one.share is None]
    if without:
        left = round((1 - total) / len(without), 6)
        would = f"give {' and '.join(without)} {left:g} each" if left > 0 else "give all a share"
        would = would.removesuffix(" each") if len(without) == 1 else would
        raise ShearlingError(
            f"calibration sources {', '.join(shares)} have shares ({summed} = {total:g}), but "
            f"{', '.join(without)} has none; {would}, or leave out every share for equal ones."
        )
    if abs(total - 1) > TOLERANCE:
        parts = by_largest_remainder(exact_shares(sources), 10_000)
        would = ", ".join(
            f"{name or 'it'} {part / 10_000:g}" for name, part in zip(shares, parts, strict=True)
        )
        raise ShearlingError(
            f"the shares of the calibration sources sum to {total:.6g} ({summed}), but 1 was "
            f"expected; in the same proportion, give {would}, or leave out every share for equal "
            "ones."
        )
    return sources
