"""The documents of files and directories, held in memory: for calibration and evaluation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

from shearling.data.records import (
    HELD_SHARE,
    SUFFIXES,
    Chat,
    Document,
    Exchange,
    read,
    split,
    suffix_of,
)
from shearling.errors import ShearlingError
from shearling.model.memory import free_bytes

Read = TypeVar("Read")


@dataclass(frozen=True, slots=True)
class UnrenderedChat:
    """A conversation that no template has turned into text yet, and how to name it in an error."""

    chat: Chat
    where: Callable[[], str]


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
    texts = list(
        _held((text for file in _files(path) for text in _read(file)), path, sys.getsizeof)
    )
    if not texts:
        raise ShearlingError(f"{path} holds no text; give a file with at least one document.")
    return texts


def documents_and_conversations(path: Path | str) -> list[str | UnrenderedChat]:
    """As :func:`documents`, conversations among them; a prompt and its answer are a document.

    A record that has a text is a document, whatever else it holds.

    Raises:
        ShearlingError: as :func:`documents`.
    """
    path = Path(path)
    records = list(_held((one for file in _files(path) for one in _read_all(file)), path, _size))
    if not records:
        raise ShearlingError(f"{path} holds no text; give a file with at least one document.")
    return records


def first_records(path: Path | str, count: int) -> list[str | UnrenderedChat]:
    """The first documents and conversations, so many at most; what lies behind is not read.

    Raises:
        ShearlingError: as :func:`documents`, as far as it was read.
    """
    path = Path(path)
    records = list(islice((one for file in _files(path) for one in _read_all(file)), count))
    if not records:
        raise ShearlingError(f"{path} holds no text; give a file with at least one document.")
    return records


def _files(path: Path) -> list[Path]:
    """The files that are read, in order (ShearlingError where there is none)."""
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
        return files
    if not path.exists():
        raise ShearlingError(
            f"There is no text at {path}; give an existing directory or a file ending in "
            f"{', '.join(SUFFIXES)}."
        )
    if not suffix_of(path):
        raise ShearlingError(
            f"{path} is not a kind of text file that is read here; give a file ending in "
            f"{', '.join(SUFFIXES)}, or a directory of such."
        )
    return [path]


def _read(file: Path) -> Iterator[str]:
    """The documents of one file."""
    for shard in split(file):
        for _, record in read(replace(shard, texts=True)):
            if isinstance(record, Document):
                yield record.text


def _read_all(file: Path) -> Iterator[str | UnrenderedChat]:
    """The documents and conversations of one file."""
    for shard in split(file):
        shard = replace(shard, text_first=True)
        for number, record in read(shard):
            if isinstance(record, Document):
                yield record.text
            elif isinstance(record, Exchange):
                yield record.prompt + record.answer
            elif record is not None:
                yield UnrenderedChat(record, partial(shard.where, number))


def _size(one: str | UnrenderedChat) -> int:
    """Bytes of a document, or of what is said in a conversation."""
    if isinstance(one, str):
        return sys.getsizeof(one)
    return sum(sys.getsizeof(said) for _, said in one.chat.messages)


def _held(texts: Iterable[Read], path: Path, size: Callable[[Read], int]) -> Iterator[Read]:
    """The same, as long as there is memory for them."""
    most = int((free_bytes() or 2**62) * HELD_SHARE)
    held = 0
    for text in texts:
        held += size(text)
        if held > most:
            raise ShearlingError(
                f"{path} holds more than {most / 1e9:.1f} GB of text, {HELD_SHARE:.0%} of the free "
                "memory; give a part of it, as no more is read than fits."
            )
        yield text
