"""What a teacher says of every token of a store, kept on disk: its likeliest tokens, and the rest.

A cache is a directory. ``teacher.json``, written last, describes it; below it lies one directory
for each domain with a safetensors file for every ``shard_rows`` sequences of the train part, named
by the first of them. Each holds ``ids`` (uint16 where the vocabulary fits, else int32), ``logp``
(float16, nats, the largest first) and ``rest`` (float32, the probability of all other tokens).
Rows are the store's, so a mixture may ask for them in any order.

Legend: N sequences, P predicted tokens of each (one fewer than a sequence has), K tokens kept,
T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shearling.data.results import CachedTeacher, CacheManifest, shard_name
from shearling.data.store import UNFINISHED, Store
from shearling.errors import ShearlingError, told
from shearling.files.reading import read_json
from shearling.files.results import refuse

MANIFEST = "teacher.json"
LOGP_SLACK = 0.01  # logarithms of probabilities in float16 may be a little above 0


@dataclass(frozen=True)
class Kept:
    """Distributions over next tokens: K of them each, and the mass of all others.

    A plain object, so that FSDP does not cast it to what the model computes in.

    Attributes:
        ids: tokens (..., K), whole numbers.
        logp: their log-probabilities (..., K), nats.
        rest: probability of the tokens that were not kept (...).
    """

    ids: Tensor
    logp: Tensor
    rest: Tensor

    def to(self, device: torch.device) -> Kept:
        """On a device."""
        return Kept(self.ids.to(device), self.logp.to(device), self.rest.to(device))

    def chosen(self, counting_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``ids``, ``logp`` and ``rest`` of the predictions that a mask (T,) names, in a row."""
        ids_TK, logp_TK = self.ids.flatten(0, 1), self.logp.flatten(0, 1)
        return ids_TK[counting_T], logp_TK[counting_T], self.rest.flatten()[counting_T]


def log_mass_outside(logits_TV: Tensor, ids_TK: Tensor) -> Tensor:
    """Logarithm of the sum of exp(logits) over all tokens but ``ids`` (T,); -inf if none is left.

    Summed over those tokens themselves: 1 less the others' mass would be rounding where it is
    small.
    """
    return logits_TV.scatter(-1, ids_TK, -math.inf).logsumexp(-1)


@dataclass(frozen=True)
class Cache:
    """A finished cache.

    Attributes:
        path: the directory.
        manifest: all that is said of it.
    """

    path: Path
    manifest: CacheManifest = field(repr=False)

    @staticmethod
    def open(path: Path) -> Cache:
        """A cache that is whole.

        Raises:
            ShearlingError: nothing is there, it is no cache, it is unfinished, a file is missing
                or was cut off, its manifest is damaged, or a newer version wrote it.
        """
        path = Path(path)
        if not (path / MANIFEST).is_file():
            begun = (path / UNFINISHED).is_dir()
            state = "is not finished" if begun else "is no cache of a teacher"
            advice = "give the same command again" if begun else "make one with `shearling teach`"
            raise ShearlingError(f"{path} {state}; {advice}.")
        values = read_json(path / MANIFEST, CacheManifest.advice)
        made = values.get("kind"), values.get("version")
        if made != (CacheManifest.kind, CacheManifest.VERSION):
            raise ShearlingError(
                f"{path} is a {told(made[0])} of version {told(made[1])}, but a "
                f"{CacheManifest.kind} of version {CacheManifest.VERSION} was expected; make one "
                "with `shearling teach`."
            )
        manifest = CacheManifest.from_json(values, path / MANIFEST)
        if not manifest.files and any(manifest.domains.values()):
            refuse(path / MANIFEST, "files", "the size of every file", values.get("files", MISSING))
        for name, described in manifest.files.items():
            file, expected = path / name, described.bytes
            size = file.stat().st_size if file.is_file() else None
            if size != expected:
                state = "is missing" if size is None else f"has {size:,} bytes"
                raise ShearlingError(
                    f"{file} {state}, where {expected:,} bytes were expected; remove {path} and "
                    "run `shearling teach` again."
                )
            least = row_bytes(manifest.store.length, manifest.top, manifest.vocab)
            if expected < least:
                raise ShearlingError(
                    f"{file} has {expected:,} bytes, but one sequence of {manifest.store.length} "
                    f"tokens with {manifest.top} kept for each takes {least:,}; remove {path} and "
                    "run `shearling teach` again."
                )
        return Cache(path, manifest)

    @property
    def store(self) -> str:
        """Fingerprint of the store whose tokens were predicted."""
        return self.manifest.store.fingerprint

    @property
    def top(self) -> int:
        """Tokens kept of each distribution."""
        return self.manifest.top

    @property
    def vocab(self) -> int:
        """How many tokens the teacher knows."""
        return self.manifest.vocab

    @property
    def teacher(self) -> CachedTeacher:
        """Name, fingerprint and size of the model."""
        return self.manifest.teacher

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest, which holds the hashes of all else."""
        return hashlib.sha256((self.path / MANIFEST).read_bytes()).hexdigest()

    def check_store(self, store: Store) -> None:
        """Raise ShearlingError unless it is this store's tokens that were predicted."""
        if store.fingerprint != self.store:
            raise ShearlingError(
                f"{self.path} holds what {self.teacher.name} says of another store "
                f"({self.manifest.store.name}, {self.store[:12]}) than {store.path} "
                f"({store.fingerprint[:12]}); run `shearling teach` on that one."
            )

    def read(self, rows: Sequence[tuple[str, int]]) -> Kept:
        """What the teacher says of train sequences, given as (domain, row), in their order.

        Returns:
            ``ids`` int32 [N, P, K], ``logp`` float16 [N, P, K] and ``rest`` float32 [N, P], on
            the CPU.

        Raises:
            ShearlingError: a shard is damaged.
        """
        size, predicted = self.manifest.shard_rows, self.manifest.store.length - 1
        kept = Kept(
            torch.empty(len(rows), predicted, self.top, dtype=torch.int32),
            torch.empty(len(rows), predicted, self.top, dtype=torch.float16),
            torch.empty(len(rows), predicted),
        )
        places: dict[tuple[str, int], list[int]] = {}
        for place, (domain, row) in enumerate(rows):
            places.setdefault((domain, row // size * size), []).append(place)
        for (domain, first), at in places.items():
            file = self.path / shard_name(domain, first)
            try:
                with safe_open(file, "pt") as shard:
                    for place in at:
                        row = rows[place][1] - first
                        for name in ("ids", "logp", "rest"):
                            _put(getattr(kept, name)[place], shard.get_slice(name)[row], name)
                self._check(kept, at)
            except (SafetensorError, OSError, IndexError, TypeError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise ShearlingError(
                    f"{file} cannot be read ({reason}); remove {self.path} and run `shearling "
                    "teach` again."
                ) from error
        return kept

    def _check(self, kept: Kept, at: Sequence[int]) -> None:
        """Raise ValueError unless what was read are tokens of the teacher's and probabilities."""
        ids, logp, rest = kept.ids[at], kept.logp[at], kept.rest[at]
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocab:
            worst = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            raise ValueError(f"it holds the token {worst}, but the teacher knows {self.vocab}")
        if bool(logp.isnan().any()) or float(logp.max()) > LOGP_SLACK:
            raise ValueError("it holds log-probabilities that are none")
        if not bool(((rest >= 0) & (rest <= 1 + LOGP_SLACK)).all()):
            raise ValueError("it holds probabilities of all other tokens that are none")


def _put(row: Tensor, stored: Tensor, name: str) -> None:
    """Fill a row; ValueError if what is stored has another shape."""
    if stored.shape != row.shape:
        raise ValueError(
            f"{name} has rows of {list(stored.shape)} where {list(row.shape)} were expected"
        )
    row.copy_(stored)


def id_dtype(vocab: int) -> torch.dtype:
    """Of the stored tokens: two bytes where the vocabulary fits, else four."""
    return torch.uint16 if vocab <= 2**16 else torch.int32


def row_bytes(length: int, top: int, vocab: int) -> int:
    """What one sequence of ``length`` tokens takes on disk."""
    return (length - 1) * (top * (torch.float16.itemsize + id_dtype(vocab).itemsize) + 4)
