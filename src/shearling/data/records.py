"""Documents and instruction data out of files, one after the other.

A line of ``.jsonl`` (also ``.gz`` and ``.zst``) or a row of ``.parquet`` is one record; a ``.txt``
file is one document. Three kinds of record are known, looked for in this order:

- ``{"messages": [{"role", "content"}, …]}``, or ``conversations`` with ``from`` and ``value``;
- a prompt with its answer: ``instruction`` and, if there is one, ``input``, then ``output``; or any
  other of PROMPTS with any other of ANSWERS;
- ``{"text": …}``, a document.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from shearling.errors import ShearlingError
from shearling.files.reading import check_size
from shearling.model.memory import free_bytes

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".parquet")
PROMPTS = ("instruction", "question", "prompt")
CONTEXTS = ("input", "context")
ANSWERS = ("output", "answer", "response", "completion")
EXPECTED = (
    'an object with "text", with "messages", or with a prompt and its answer '
    '("instruction" and "output", "question" and "answer")'
)
EXPECTED_TEXT = 'an object like {"text": "…"}'
# Bytes of a line at most, which is a record; those of a compressed file are counted unpacked.
MAX_LINE = 100_000_000
# Of the memory that is free, text may take this share before it is tokenised.
HELD_SHARE = 0.5

# Small enough that little is lost with an interruption, large enough that files stay few.
SHARD_BYTES = 32_000_000
# Rows of a parquet file turned into Python values at a time.
ROWS = 256

_WANTED = ("text", "messages", "conversations", *PROMPTS, *ANSWERS)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True)
class Document:
    """A document, all of which is learned."""

    text: str


@dataclass(frozen=True)
class Exchange:
    """A prompt, ready to be followed by its answer, which alone is learned."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Chat:
    """Messages as (role, content), of which the assistant's are learned."""

    messages: tuple[tuple[str, str], ...]


Record = Document | Exchange | Chat


@dataclass(frozen=True)
class Shard:
    """A part of a file that is read at one go.

    ``start`` and ``stop`` are bytes of a .jsonl file (the lines that begin there), row groups of
    a .parquet file, and 0 and the size of any other, which is read whole. ``size`` is in bytes.
    ``max_line`` is how many bytes a line may have, unpacked; ``texts``: documents alone are read,
    whatever else a record holds; ``text_first``: a record that has a text is a document, whatever
    else it holds.
    """

    file: Path
    start: int
    stop: int
    size: int
    max_line: int = MAX_LINE
    texts: bool = False
    text_first: bool = False

    @property
    def expected(self) -> str:
        """What a record has to be."""
        return EXPECTED_TEXT if self.texts else EXPECTED

    def where(self, number: int) -> str:
        """How to name the record that :func:`read` gave this number."""
        if suffix_of(self.file) == ".txt":
            return str(self.file)
        row = "Row" if suffix_of(self.file) == ".parquet" else "Line"
        return f"{row} {_before(self) + number} of {self.file}"


def suffix_of(file: Path) -> str | None:
    """Which of SUFFIXES the file has; None if it has another."""
    return next((suffix for suffix in SUFFIXES if file.name.lower().endswith(suffix)), None)


def digest(record: Record, seed: int) -> int:
    """64 bits that depend on the seed and what the record says, and on nothing else."""
    # What repr() escapes depends on the Unicode tables of this Python; ascii() escapes it all.
    said = record.text if isinstance(record, Document) else ascii(record)
    key = str(seed).encode()
    return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8, key=key).digest(), "little")


def split(file: Path, shard_bytes: int = SHARD_BYTES, *, max_line: int = MAX_LINE) -> list[Shard]:
    """A file as shards of about so many bytes; a compressed file and a text are one shard.

    Raises:
        ShearlingError: it cannot be read.
    """
    with _readable(file):
        size = file.stat().st_size
        if suffix_of(file) == ".jsonl":
            starts = range(0, size, shard_bytes)
            ends = (min(start + shard_bytes, size) for start in starts)
            return [Shard(file, a, b, b - a, max_line) for a, b in zip(starts, ends, strict=True)]
        if suffix_of(file) != ".parquet":
            return [Shard(file, 0, size, size, max_line)]
        from pyarrow import parquet

        groups: list[list[int]] = []  # start, stop, bytes
        with parquet.ParquetFile(file) as table:
            for group in range(table.num_row_groups):
                if not groups or groups[-1][2] >= shard_bytes:
                    groups.append([group, group, 0])
                groups[-1][1] += 1
                groups[-1][2] += table.metadata.row_group(group).total_byte_size
        return [Shard(file, *group, max_line=max_line) for group in groups]


def read(shard: Shard) -> Iterator[tuple[int, Record | None]]:
    """Records with their number in the shard, from 1; None where there is nothing to learn.

    That is: white space alone, an empty answer, a conversation in which the assistant says
    nothing. Half a surrogate pair, which no tokenizer takes, becomes U+FFFD. One record is in
    memory at a time (of parquet, ROWS).

    Raises:
        ShearlingError: the file cannot be read, or a record is none; it names file and line.
    """
    with _readable(shard.file):
        suffix = suffix_of(shard.file)
        if suffix == ".parquet":
            for number, row in enumerate(_rows(shard), 1):
                yield number, _record(row, shard, number)
        elif suffix == ".txt":
            check_size(shard.file, int((free_bytes() or 2**62) * HELD_SHARE / 2))
            text = _decoded(shard.file.read_bytes(), shard, 1)
            yield 1, _record({"text": text}, shard, 1)
        else:
            for number, line in enumerate(_numbered(shard), 1):
                if line.strip():
                    yield number, _record(_json(line, shard, number), shard, number)


@contextmanager
def _readable(file: Path) -> Generator[None]:
    """What a library says of a broken file, in one sentence."""
    try:
        yield
    except ShearlingError:
        raise
    except (OSError, EOFError, zlib.error, ValueError, NotImplementedError) as error:
        # pyarrow's errors are of the first and the last two kinds.
        reason = " ".join(str(error).split()).rstrip(".")
        raise ShearlingError(
            f"{file} cannot be read ({reason}); give a file that is whole and readable."
        ) from error


def _numbered(shard: Shard) -> Iterator[bytes]:
    """The lines that begin in the shard; the number of one that is too long is told."""
    number = 0
    try:
        for line in _lines(shard):
            number += 1
            yield line
    except LongLineError as error:
        allowed = "`shearling pack` takes longer ones with" if shard.texts else "or allow it with"
        raise ShearlingError(
            f"{shard.where(number + 1)} is {error} and would be held in memory; split it into "
            f"several documents ({allowed} a larger --max-line)."
        ) from error


def _lines(shard: Shard) -> Iterator[bytes]:
    with _opened(shard.file) as stream:
        if suffix_of(shard.file) != ".jsonl":
            yield from lines_of(stream, shard.max_line)
            return
        position = _seek(stream, shard.start)
        if position < shard.stop:
            for line in lines_of(stream, shard.max_line):
                position += len(line)
                yield line
                if position >= shard.stop:
                    break


@contextmanager
def _opened(file: Path) -> Generator[IO[bytes]]:
    suffix = suffix_of(file)
    if suffix == ".jsonl.zst":
        import pyarrow

        # Unlike zstandard's reader it notices a file that was cut off.
        with pyarrow.CompressedInputStream(pyarrow.OSFile(str(file)), "zstd") as raw:
            yield io.BufferedReader(raw, 1 << 20)
    else:
        opener: Any = gzip.open if suffix == ".jsonl.gz" else open
        with opener(file, "rb") as stream:
            yield stream


def _seek(stream: IO[bytes], start: int) -> int:
    """Go to where the first line begins at or after ``start``; returns the place."""
    if not start:
        return 0
    position = start - 1
    stream.seek(position)
    while part := stream.readline(1 << 20):  # a long line is not held in memory
        position += len(part)
        if part.endswith(b"\n"):
            break
    return position


def _rows(shard: Shard) -> Iterator[Mapping[str, Any]]:
    from pyarrow import parquet

    known = {"messages", "conversations", "text", *PROMPTS, *CONTEXTS, *ANSWERS}
    with parquet.ParquetFile(shard.file) as table:
        # Where none is known all are read, so that the error can name them.
        columns = [name for name in table.schema_arrow.names if name in known] or None
        groups = list(range(shard.start, shard.stop))
        batches = table.iter_batches(ROWS, row_groups=groups, columns=columns, use_threads=False)
        for batch in batches:
            yield from batch.to_pylist()


def _before(shard: Shard) -> int:
    """Lines or rows of the file that lie before the shard; only asked for when one is wrong."""
    if shard.start == 0:
        return 0
    if suffix_of(shard.file) == ".parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(shard.file) as table:
            groups = range(shard.start)
            return sum(table.metadata.row_group(group).num_rows for group in groups)
    with shard.file.open("rb") as stream:
        end, count = _seek(stream, shard.start), 0
        stream.seek(0)
        while end > 0 and (block := stream.read(min(end, 1 << 20))):
            count += block.count(b"\n")
            end -= len(block)
    return count


def _decoded(given: bytes, shard: Shard, number: int) -> str:
    try:
        return given.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ShearlingError(
            f"{shard.where(number)} is not UTF-8 ({error.reason}); give text in that encoding."
        ) from error


def _json(line: bytes, shard: Shard, number: int) -> Any:
    try:
        return json.loads(_decoded(line, shard, number))
    except ShearlingError:
        raise
    except (ValueError, RecursionError) as error:
        raise ShearlingError(
            f"{shard.where(number)} is not JSON ({error}); each must be {shard.expected}."
        ) from error


def _record(value: Any, shard: Shard, number: int) -> Record | None:
    """What one line or row says; None where there is nothing to learn."""
    if isinstance(value, dict):
        has_text = isinstance(value.get("text"), str)
        if not shard.texts and not (has_text and shard.text_first):
            for key, role, content in (
                ("messages", "role", "content"),
                ("conversations", "from", "value"),
            ):
                if isinstance(value.get(key), list):
                    return _chat(value[key], role, content, shard, number)
            prompt, answer = (
                next((key for key in keys if isinstance(value.get(key), str)), None)
                for keys in (PROMPTS, ANSWERS)
            )
            if prompt and answer:
                return _exchange(value, prompt, answer)
        if has_text:
            text = _LONE_SURROGATE.sub("\ufffd", value["text"])
            return Document(text) if text.strip() else None
    kind = _misfit(value, shard)
    raise ShearlingError(f"{shard.where(number)} {kind}; each must be {shard.expected}.")


def _misfit(value: Any, shard: Shard) -> str:
    """What is wrong with what is no record."""
    if isinstance(value, dict):
        for key in ("text",) if shard.texts else _WANTED:
            wanted = "a list" if key in ("messages", "conversations") else "a string"
            if key in value and _called(value[key]) != wanted:
                return f'has {_called(value[key])} as "{key}", where {wanted} was expected'
        kind = f"has the keys {', '.join(map(str, value)) or '(none)'}"
    else:
        kind = f"is {_called(value)}"
    return f'has no string "text", but {kind}' if shard.texts else kind


def _called(value: Any) -> str:
    """What a value of JSON is, in words."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string",
             list: "a list", dict: "an object", type(None): "null"}  # fmt: skip
    return names.get(type(value), f"of type {type(value).__name__}")


def _exchange(value: Mapping[str, Any], prompt: str, answer: str) -> Exchange | None:
    """The prompt and what it is about, a blank line after each; a completion follows directly."""
    parts = [value[prompt], *(value[key] for key in CONTEXTS if isinstance(value.get(key), str))]
    verbatim = (prompt, answer) == ("prompt", "completion")
    said = "\n\n".join(part for part in parts if part.strip())
    if said and not verbatim:
        said += "\n\n"
    said, reply = (_LONE_SURROGATE.sub("\ufffd", each) for each in (said, value[answer]))
    return Exchange(said, reply) if reply.strip() else None


def _chat(given: list[Any], role: str, content: str, shard: Shard, number: int) -> Chat | None:
    messages: list[tuple[str, str]] = []
    for position, message in enumerate(given, 1):
        said = (message.get(role), message.get(content)) if isinstance(message, dict) else ()
        if len(said) != 2 or not all(isinstance(each, str) for each in said):
            raise ShearlingError(
                f"{shard.where(number)} has a message {position} without strings "
                f'"{role}" and "{content}"; every message needs both.'
            )
        name, text = (_LONE_SURROGATE.sub("\ufffd", each) for each in said)
        messages.append((_SHAREGPT.get(name, name) if role == "from" else name, text))
    learned = any(name == "assistant" and text.strip() for name, text in messages)
    return Chat(tuple(messages)) if learned else None


def lines_of(stream: IO[bytes], most: int) -> Iterator[bytes]:
    """The lines of a stream, none of more than ``most`` bytes in memory.

    Raises:
        LongLineError: a line is longer.
    """
    while line := stream.readline(most + 1):
        if len(line) > most:
            raise LongLineError(most)
        yield line


class LongLineError(ValueError):
    """A line that is longer than what is read at a time."""

    def __init__(self, most: int) -> None:
        """Say how long a line may be."""
        super().__init__(f"longer than {most / 1e6:,.0f} MB")
