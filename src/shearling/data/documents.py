"""The documents of files and directories, held in memory: for calibration and evaluation."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from shearling.data.records import HELD_SHARE, SUFFIXES, Document, read, split, suffix_of
from shearling.errors import ShearlingError
from shearling.model.memory import free_bytes


def documents(path: Path | str) -> list[str]:
    """The documents of a file or of every file below a directory, in a fixed order.

    A line of a ``.jsonl`` file (also ``.gz`` and ``.zst``) is one document, ``{"text": …}``, and so
    is a row of a ``.parquet`` file and a whole ``.txt``. A directory is read recursively in sorted
    order; files of another kind and hidden ones are passed over. Documents of white space alone are
    left out, and half a surrogate pair, which no tokenizer takes, becomes U+FFFD. All of the text
    is held in memory.

    Raises:
        ShearlingError: nothing is there, it has another suffix, a line is not what it should be,
            a file is not UTF-8 or broken, or there is no text at all.
    """
    path = Path(path)
    if path.is_dir():
        files = [
            file
            for file in sorted(path.rglob("*"))
            if file.is_file()
            and suffix_of(file)
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        if not files:
            raise ShearlingError(
                f"The directory {path} holds no text; give one with files ending in "
                f"{', '.join(SUFFIXES)}."
            )
    elif not path.exists():
        raise ShearlingError(
            f"There is no text at {path}; give an existing directory or a file ending in "
            f"{', '.join(SUFFIXES)}."
        )
    elif not suffix_of(path):
        raise ShearlingError(
            f"{path} is not a kind of text file that is read here; give a file ending in "
            f"{', '.join(SUFFIXES)}, or a directory of such."
        )
    else:
        files = [path]
    texts = list(_held((text for file in files for text in _read(file)), path))
    if not texts:
        raise ShearlingError(f"{path} holds no text; give a file with at least one document.")
    return texts


def _read(file: Path) -> Iterator[str]:
    """The documents of one file."""
    for shard in split(file):
        for _, record in read(replace(shard, texts=True)):
            if isinstance(record, Document):
                yield record.text


def _held(texts: Iterable[str], path: Path) -> Iterator[str]:
    """The same texts, as long as there is memory for them."""
    most = int((free_bytes() or 2**62) * HELD_SHARE)
    held = 0
    for text in texts:
        held += sys.getsizeof(text)
        if held > most:
            raise ShearlingError(
                f"{path} holds more than {most / 1e9:.1f} GB of text, {HELD_SHARE:.0%} of the free "
                "memory; give a part of it, as no more is read than fits."
            )
        yield text
