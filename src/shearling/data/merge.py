"""From the tokens of documents to the two parts of a domain: split by document, cut, written.

Documents are laid end to end and cut into sequences. Where the tokenizer puts a BOS before a text,
every document has its own (and EOS behind it, as such models were trained), and every sequence
begins with one as well: nine sequences in ten begin inside a document, and a model that has never
read a text without BOS says little of them (:mod:`shearling.data.bos`). A sequence that begins with
a document has that one's.

Legend: D documents, T tokens a sequence.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from shearling.data.results import PackedDomain, PackedPart
from shearling.data.store import MASK, PARTS, TOKENS
from shearling.errors import ShearlingError

# Of every document: its digest, and how many tokens it has.
DOCUMENT = np.dtype([("digest", "<u8"), ("tokens", "<u8")])
# Tokens copied at a time.
CHUNK = 8_000_000


def choose_held_out(documents: np.ndarray, share: float, length: int) -> np.ndarray:
    """Which documents are held out, bool [D].

    A document is held out if its digest lies in the lowest ``share`` of all digests there could
    be: whatever else there is, and in whatever order. If these have fewer tokens than a sequence,
    those next in the order of digests are added, one after the other, as long as training keeps a
    sequence as well. Documents that are equal have one digest, so they stay together.
    """
    if share == 0 or not len(documents):
        return np.zeros(len(documents), dtype=bool)
    digests, inverse = np.unique(documents["digest"], return_inverse=True)
    tokens = np.zeros(len(digests), dtype=np.int64)
    np.add.at(tokens, inverse, documents["tokens"].astype(np.int64))
    held = digests.astype(np.float64) < share * 2.0**64
    left = int(tokens[~held].sum())
    held_tokens = int(tokens[held].sum())
    for i in np.flatnonzero(~held):  # already sorted by digest
        if held_tokens >= length:
            break
        if left - tokens[i] >= length:
            held[i] = True
            left, held_tokens = left - int(tokens[i]), held_tokens + int(tokens[i])
    return held[inverse]


def choose_tail(
    documents: np.ndarray, held: np.ndarray, share: float, length: int
) -> tuple[int, int] | None:
    """A document to be cut in two, and how many tokens of its end are held out; None for none.

    Only where whole documents do not give both parts a sequence, as of a single .txt. The longest
    is cut (the first of several): of its tokens ``share`` are held out, at least a sequence, and
    one at least is left. One that comes twice is not cut: its copy would be trained on whole.
    """
    sizes = documents["tokens"].astype(np.int64)
    if not share or min(sizes[held].sum(), sizes[~held].sum()) >= length:
        return None
    at = int(sizes.argmax())
    tokens, copies = int(sizes[at]), int((documents["digest"] == documents["digest"][at]).sum())
    if copies > 1 or tokens < 2 * length:
        return None
    return at, min(max(round(share * tokens), length), tokens - length)


def _cut(
    tables: list[np.ndarray], held: np.ndarray, at: int, tail: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """The tables of all shards, and who is held out, with the end of a document held out."""
    starts = np.cumsum([0, *map(len, tables)])
    shard = int(np.searchsorted(starts, at, side="right")) - 1
    row = at - int(starts[shard])
    table = np.insert(tables[shard], row + 1, tables[shard][row])
    table["tokens"][row] -= tail
    table["tokens"][row + 1] = tail
    held = np.insert(held, at + 1, True)
    held[at] = False
    return [*tables[:shard], table, *tables[shard + 1 :]], held


def merge(
    domain: str, shards: Sequence[Path], output: Path, *, length: int, share: float,
    dtype: np.dtype, bos: int | None = None,
) -> PackedDomain:  # fmt: skip
    """Write a domain's parts from what its shards hold, and describe them.

    Args:
        domain: for messages, and the directory below ``output``.
        shards: in the order of the text; each a path to which ``.ids``, ``.mask`` (where not all
            is learned) and ``.documents`` are appended.
        output: the store.
        length: tokens a sequence.
        share: of the documents, to be held out.
        dtype: of the tokens.
        bos: the token with which every sequence begins; None for none.

    Raises:
        ShearlingError: there is no document, or too little text for both parts.
    """
    tables = [np.fromfile(f"{shard}.documents", DOCUMENT) for shard in shards]
    documents = np.concatenate([*tables, np.empty(0, DOCUMENT)])
    if not len(documents):
        raise ShearlingError(
            f"the domain {domain!r} holds no text; give files with at least one document."
        )
    held = choose_held_out(documents, share, length)
    masked = any(Path(f"{shard}.mask").exists() for shard in shards)
    # An answer is not cut in two.
    cut = None if masked else choose_tail(documents, held, share, length)
    if cut is not None:
        tables, held = _cut(tables, held, *cut)
    writers = [_Part(output / domain / part, length, masked, bos) for part in PARTS]
    try:
        first = 0
        for shard, table in zip(shards, tables, strict=True):
            _distribute(shard, table, held[first : first + len(table)], writers, dtype)
            first += len(table)
        parts = {part: writer.finish() for part, writer in zip(PARTS, writers, strict=True)}
    finally:
        for writer in writers:
            writer.close()
    _require(domain, parts, documents, length, share)
    ends = 0 if cut is None else 1  # no document of its own
    return PackedDomain(
        train=replace(parts["train"], documents=int((~held).sum())),
        held_out=replace(parts["held_out"], documents=int(held.sum()) - ends),
        held_out_end=None if cut is None else cut[1],
    )


def _require(
    domain: str, parts: dict[str, PackedPart], documents: np.ndarray, length: int, share: float
) -> None:
    wanted = PARTS if share else PARTS[:1]
    if all(parts[part].sequences for part in wanted):
        return
    total = int(documents["tokens"].sum())
    count = len(np.unique(documents["digest"]))
    needed = "a sequence to train on and one held out" if share else "a sequence"
    advice = ", or --held-out 0 to hold nothing out" if share else ""
    short = total < length * (2 if share else 1)
    why = "too little" if short else "which are not cut and do not give enough"
    different = "1 document" if count == 1 else f"{count:,} different documents"
    raise ShearlingError(
        f"the domain {domain!r} has {total:,} tokens in {different}, {why} for {needed} of "
        f"{length:,} tokens each; give more documents, a smaller --length{advice}."
    )


def _distribute(
    shard: Path, table: np.ndarray, held: np.ndarray, writers: Sequence[_Part], dtype: np.dtype
) -> None:
    """Give each part the documents of a shard that are its own, in their order."""
    if not len(table):
        return
    ids = np.memmap(f"{shard}.ids", dtype, mode="r")
    file = Path(f"{shard}.mask")
    mask = np.memmap(file, np.uint8, mode="r") if file.exists() else None
    ends = np.cumsum(table["tokens"].astype(np.int64))
    start, first = 0, 0
    while first < len(table):
        last = max(first + 1, int(np.searchsorted(ends, start + CHUNK)))
        stop = int(ends[last - 1])
        sizes = table["tokens"][first:last].astype(np.int64)
        side = np.repeat(held[first:last], sizes)
        part, learned = ids[start:stop], None if mask is None else mask[start:stop]
        for writer, chosen in zip(writers, (~side, side), strict=True):
            writer.add(part[chosen], None if learned is None else learned[chosen])
        start, first = stop, last


class _Part:
    """A part of a domain as it is written: whole sequences, and what is left over."""

    def __init__(self, folder: Path, length: int, masked: bool, bos: int | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.length, self.bos = length, bos
        self.files = {TOKENS: (folder / TOKENS).open("wb")}
        if masked:
            self.files[MASK] = (folder / MASK).open("wb")
        else:
            (folder / MASK).unlink(missing_ok=True)
        self.digests = {name: hashlib.sha256() for name in self.files}
        self.rest: tuple[np.ndarray, np.ndarray] | None = None
        self.sequences = self.learned = self.unlearned = 0

    def add(self, ids: np.ndarray, mask: np.ndarray | None) -> None:
        """Take the tokens of documents; a mask is 1 where they are learned, None if all are."""
        if mask is None:
            mask = np.ones(len(ids), dtype=np.uint8)
        if self.rest is not None:
            ids = np.concatenate([self.rest[0], ids])
            mask = np.concatenate([self.rest[1], mask])
        rows_NT, mask_NT, whole = self._cut(ids, mask)
        self.rest = ids[whole:].copy(), mask[whole:].copy()
        # The first token of a sequence is predicted by none.
        useful = mask_NT[:, 1:].any(axis=1)
        self.unlearned += int((~useful).sum()) * self.length
        self.sequences += int(useful.sum())
        self.learned += int(mask_NT[useful].sum())
        self._write(TOKENS, rows_NT[useful])
        if MASK in self.files:
            self._write(MASK, mask_NT[useful])

    def _cut(self, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """Whole sequences and their mask (N, T), and how many of the tokens are in them."""
        length, shape = self.length, (-1, self.length)
        if self.bos is None:
            whole = len(ids) // length * length
            return ids[:whole].reshape(shape), mask[:whole].reshape(shape), whole
        ends, at = [], 0
        while at < len(ids):
            begins = ids[at] == self.bos  # a document, with a BOS of its own
            at += length if begins else length - 1
            if at > len(ids):
                break
            ends.append(at)
        # A sequence's last tokens are those before its end; its first is BOS in any case, and may
        # stand for the last of the sequence before.
        at_NT = np.array(ends, dtype=np.int64)[:, None] + np.arange(-length, 0)
        rows_NT, mask_NT = ids[at_NT], mask[at_NT]
        rows_NT[:, :1] = self.bos
        mask_NT[rows_NT == self.bos] = 0  # it is never predicted
        return rows_NT, mask_NT, ends[-1] if ends else 0

    def finish(self) -> PackedPart:
        """Flush to disk and describe what was written."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        return PackedPart(
            sequences=self.sequences,
            tokens=self.sequences * self.length,
            learned_tokens=self.learned,
            dropped_remainder=0 if self.rest is None else len(self.rest[0]),
            dropped_without_answer=self.unlearned,
            tokens_sha256=self.digests[TOKENS].hexdigest(),
            mask_sha256=self.digests[MASK].hexdigest() if MASK in self.files else None,
        )

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def _write(self, name: str, rows: np.ndarray) -> None:
        data = np.ascontiguousarray(rows).tobytes()
        self.digests[name].update(data)
        self.files[name].write(data)
