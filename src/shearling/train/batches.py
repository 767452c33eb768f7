"""Batches read from a store while the step before is computed, in the order that was asked for.

Which sequences a step sees is the mixture's business; a batch that was read ahead is used only if
it is the one asked for, so that nothing depends on what was guessed. For a GPU it lies in
page-locked memory, from which copies do not wait.

Shapes: N sequences of a rank's step, B of a micro-batch, S positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from shearling.data.store import Store
from shearling.data.teacher import Cache, Kept
from shearling.train.objective import Counting, counted

Rows = Sequence[tuple[str, int]]


@dataclass(frozen=True)
class Micro:
    """Sequences that are in memory at a time, on the device: tokens and labels (B, S)."""

    ids: Tensor
    labels: Tensor
    kept: Kept | None
    counting: Counting


@dataclass(frozen=True)
class Batch:
    """A rank's sequences of a step, on the host: tokens and labels (N, S)."""

    ids: Tensor
    labels: Tensor
    kept: Kept | None

    @property
    def counted(self) -> int:
        """Tokens that are predicted and count."""
        return counted(self.labels)

    def micro(self, size: int, device: torch.device) -> Iterator[Micro]:
        """The batch, ``size`` sequences at a time, on a device, which is not waited for."""
        for first in range(0, len(self.ids), size):
            part = slice(first, first + size)
            labels = self.labels[part]
            places = Counting.of(labels).places
            kept = self.kept and _moved_kept(self.kept, part, device)
            yield Micro(
                _moved(self.ids[part], device), _moved(labels, device), kept,
                Counting(None if places is None else _moved(_pinned(places, device), device)),
            )  # fmt: skip


def _moved_kept(kept: Kept, part: slice, device: torch.device) -> Kept:
    return Kept(*(_moved(each[part], device) for each in (kept.ids, kept.logp, kept.rest)))


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory() if device.type == "cuda" else tensor


class Reader:
    """Reads a store's sequences, and what an absent teacher said of them.

    Args:
        store: the data.
        cache: of a teacher, for training sequences.
        device: where batches are to go.
    """

    def __init__(self, store: Store, cache: Cache | None, device: torch.device) -> None:
        """Read nothing yet."""
        self.store, self.cache, self.device = store, cache, device
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: tuple[list[tuple[str, int]], Future[Batch]] | None = None

    def batch(self, rows: Rows) -> Batch:
        """Training sequences, read before or now."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == list(rows):
            return ahead[1].result()
        return self._batch(rows)

    def read_ahead(self, rows: Rows) -> None:
        """Begin to read what is likely to be asked for next."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead = list(rows), self._thread.submit(self._batch, list(rows))

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._thread = self._ahead = None

    def read(self, part: str, rows: Rows) -> tuple[Tensor, Tensor]:
        """Tokens and labels (N, S) in the order of ``rows``; each domain is read once."""
        ids_NS = torch.empty(len(rows), self.store.length, dtype=torch.long)
        labels_NS = torch.empty_like(ids_NS)
        for domain in dict.fromkeys(domain for domain, _ in rows):
            places = [i for i, (name, _) in enumerate(rows) if name == domain]
            read = self.store.sequences(domain, part)[[rows[i][1] for i in places]]
            ids_NS[places], labels_NS[places] = read
        return ids_NS, labels_NS

    def _batch(self, rows: Rows) -> Batch:
        ids_NS, labels_NS = (_pinned(each, self.device) for each in self.read("train", rows))
        kept = None if self.cache is None else self.cache.read(rows)
        if kept is not None:
            kept = Kept(*(_pinned(each, self.device) for each in (kept.ids, kept.logp, kept.rest)))
        return Batch(ids_NS, labels_NS, kept)
