"""A token store: packed sequences of several domains, mapped from disk.

A store is a directory. ``store.json``, written last, describes it; below it lies one directory for
each domain, in which ``train`` and ``held_out`` hold ``tokens.bin``, rows of ``length`` token ids
(little-endian, the manifest's dtype), and, where not every token is learned, ``mask.bin``, a byte
for each token: 1 where its loss counts.

Legend: N sequences, T tokens a sequence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from shearling.data.bos import opening
from shearling.data.results import StoreManifest
from shearling.errors import ShearlingError, told
from shearling.files.reading import read_json
from shearling.files.results import refuse
from shearling.model.loading import load_tokenizer

MANIFEST = "store.json"
UNFINISHED = ".unfinished"
PARTS = ("train", "held_out")
TOKENS, MASK = "tokens.bin", "mask.bin"
IGNORED = -100  # a label without a loss; what torch's cross entropy leaves out unless told


@dataclass(frozen=True)
class Store:
    """A finished store: its sequences' length, its tokenizer's hash, its domains, sorted.

    Attributes:
        path: the directory.
        manifest: all that is said of it.
        vocab: tokens that the model which reads it knows, see :meth:`within`.
    """

    path: Path
    manifest: StoreManifest = field(repr=False)
    vocab: int | None = None

    @staticmethod
    def open(path: Path) -> Store:
        """A store that is whole.

        Raises:
            ShearlingError: nothing is there, it is no store, it is still being written, a file
                of it is missing or was cut off, its manifest is damaged, or a newer version
                wrote it.
        """
        path = Path(path)
        file = path / MANIFEST
        if not file.is_file():
            raise ShearlingError(_no_store(path))
        values = read_json(file, StoreManifest.advice)
        if values.get("kind") != StoreManifest.kind:
            raise ShearlingError(f"{path} is no token store; make one with `shearling pack`.")
        if values.get("version") != StoreManifest.VERSION:
            raise ShearlingError(
                f"{path} is a token store of version {told(values.get('version'))}, but this "
                f"program reads version {StoreManifest.VERSION}; pack it again."
            )
        manifest = StoreManifest.from_json(values, file)
        if not manifest.domains:
            refuse(file, "domains", "at least one domain", values.get("domains", MISSING))
        store = Store(path, manifest)
        for domain in store.domains:
            for part in PARTS:
                store.sequences(domain, part).check()
        return store

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.manifest.length

    @property
    def tokenizer(self) -> str:
        """The hash of the tokenizer that made it."""
        return self.manifest.tokenizer.sha256

    @property
    def domains(self) -> tuple[str, ...]:
        """Names, sorted."""
        return tuple(sorted(self.manifest.domains))

    def within(self, vocab: int) -> Store:
        """The same store, whose sequences are refused where a model of ``vocab`` tokens has none.

        A damaged file, or one packed for a model with more words, holds such tokens.
        """
        return replace(self, vocab=vocab)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest, which holds the hashes of all else."""
        return hashlib.sha256((self.path / MANIFEST).read_bytes()).hexdigest()

    def sequences(self, domain: str, part: str = "train") -> Sequences:
        """The sequences of a domain's ``train`` or ``held_out`` part.

        Raises:
            ShearlingError: there is no such domain or part.
        """
        if domain not in self.domains:
            raise ShearlingError(
                f"{self.path} has no domain {domain!r}; it has {', '.join(self.domains)}."
            )
        if part not in PARTS:
            raise ShearlingError(f"a part is called {' or '.join(PARTS)}, not {part!r}.")
        described = self.manifest.domains[domain]
        packed = described.train if part == "train" else described.held_out
        return Sequences(
            self.path / domain / part, packed.sequences, self.length, self.manifest.dtype,
            packed.mask_sha256 is not None, self.bos, self.vocab,
        )  # fmt: skip

    @property
    def bos(self) -> int | None:
        """The token with which every sequence and every document begins; None where none does."""
        return self.manifest.bos

    def check_tokenizer(self, model_dir: Path, bos: bool | None = None) -> None:
        """Raise ShearlingError unless the store is made as this model reads text.

        That is with its tokenizer, and with a BOS before every sequence if ``bos`` says so, or if
        it is None and the tokenizer puts one before a text.
        """
        tokenizer = load_tokenizer(model_dir)
        own = tokenizer_hash(tokenizer)
        if own != self.tokenizer:
            made = self.manifest.tokenizer.name
            raise ShearlingError(
                f"{self.path} was packed with the tokenizer of {made} ({self.tokenizer[:12]}), "
                f"but that of {model_dir} differs ({own[:12]}); pack the text anew with "
                f"--tokenizer {model_dir}."
            )
        if (begin := opening(tokenizer, bos)) != self.bos:
            raise ShearlingError(_other_beginning(self, tokenizer, model_dir, begin, bos))


def _other_beginning(
    store: Store, tokenizer: PreTrainedTokenizerBase, model: Path, begin: int | None,
    asked: bool | None,
) -> str:  # fmt: skip
    """Why a store does not go with a model that begins its texts with the token ``begin``."""
    begins = "do not begin" if store.bos is None else "begin"
    token = tokenizer.bos_token if begin is None else tokenizer.convert_ids_to_tokens(begin)
    if asked is None:
        wanted = (
            f"the tokenizer of {model} puts {'no BOS' if begin is None else token} before a text"
        )
    else:
        wanted = f"{'--bos' if asked else '--no-bos'} was given for {model}"
    as_packed = "--no-bos" if store.bos is None else "--bos"
    repack = "--no-bos" if begin is None else "--bos"
    return (
        f"the sequences of {store.path} {begins} with the BOS token {token}, but {wanted}; pack "
        f"the text anew with {repack}, or give {as_packed} to use them as they are."
    )


def _no_store(path: Path) -> str:
    """Why there is no manifest."""
    if not path.exists():
        return f"There is no token store at {path}; make one with `shearling pack`."
    if (path / UNFINISHED).is_dir():
        return (
            f"{path} is still being written, or its writing was interrupted; wait for it, or give "
            "the same `shearling pack` command again to finish it."
        )
    return f"{path} is no token store; make one with `shearling pack`."


@dataclass(frozen=True)
class Sequences:
    """Packed sequences of one part of one domain, read where they are asked for."""

    folder: Path
    rows: int
    length: int
    dtype: str
    masked: bool
    bos: int | None = None
    vocab: int | None = None

    def __len__(self) -> int:
        """Number of sequences."""
        return self.rows

    def __getitem__(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Ids [N, T] and labels [N, T], int64; a label is its id, or -100 where no loss counts.

        None does where a sequence or a document begins with BOS.

        Raises:
            IndexError: there is no such sequence.
            ShearlingError: a token is none of the model's.
        """
        chosen = np.asarray(rows, dtype=np.int64).reshape(-1)
        if len(chosen) and (chosen.min() < 0 or chosen.max() >= self.rows):
            raise IndexError(f"rows {chosen.min()} to {chosen.max()} of {self.rows}")
        ids_NT = torch.from_numpy(self._tokens[chosen].astype(np.int64))
        self._check_ids(chosen, ids_NT)
        labels_NT = ids_NT.clone()
        if self.bos is not None:
            labels_NT[ids_NT == self.bos] = IGNORED
        if self._mask is not None:
            labels_NT[torch.from_numpy(self._mask[chosen] == 0)] = IGNORED
        return ids_NT, labels_NT

    def __getstate__(self) -> dict[str, Any]:
        """Another process maps the files itself, rather than be sent them."""
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}

    def _check_ids(self, rows: np.ndarray, ids_NT: Tensor) -> None:
        """Raise ShearlingError where a token is none of the model's that reads them."""
        if self.vocab is None or not len(rows) or int(ids_NT.max()) < self.vocab:
            return
        row = int(ids_NT.amax(1).argmax())
        raise ShearlingError(
            f"{self.folder / TOKENS} holds the token {int(ids_NT[row].max())} in sequence "
            f"{int(rows[row])}, but the model knows {self.vocab} tokens; the file is damaged, or "
            "was packed for another model: pack the store anew."
        )

    def check(self) -> None:
        """Raise ShearlingError unless the files have the size the manifest says."""
        files = {TOKENS: self._little_endian.itemsize} | ({MASK: 1} if self.masked else {})
        for name, width in files.items():
            file, expected = self.folder / name, self.rows * self.length * width
            size = file.stat().st_size if file.is_file() else None
            if size != expected:
                state = "is missing" if size is None else f"has {size:,} bytes"
                raise ShearlingError(
                    f"{file} {state}, where {expected:,} bytes were expected; pack the store anew."
                )

    @property
    def _little_endian(self) -> np.dtype:
        return np.dtype(self.dtype).newbyteorder("<")

    @cached_property
    def _tokens(self) -> np.ndarray:
        return self._map(TOKENS, self._little_endian)

    @cached_property
    def _mask(self) -> np.ndarray | None:
        return self._map(MASK, np.dtype(np.uint8)) if self.masked else None

    def _map(self, name: str, dtype: np.dtype) -> np.ndarray:
        if not self.rows:  # an empty file cannot be mapped
            return np.empty((0, self.length), dtype=dtype)
        return np.memmap(self.folder / name, dtype, mode="r", shape=(self.rows, self.length))


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase | Path | str) -> str:
    """SHA-256 of what makes ids out of text: the same after a tokenizer is saved and loaded.

    What only matters in the other direction (the decoder), to conversations (the chat template)
    or to one call (padding, truncation) is left out. A prefix or suffix that is empty is none:
    versions of transformers write one or the other.

    Raises:
        ShearlingError: a directory was given that holds no tokenizer.
    """
    if isinstance(tokenizer, Path | str):
        tokenizer = load_tokenizer(Path(tokenizer))
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        parts: dict[str, Any] = {"class": type(tokenizer).__name__}
    else:
        whole = json.loads(backend.to_str())
        parts = {key: whole.get(key) for key in ("normalizer", "pre_tokenizer", "model")}
        model = whole["model"].items()
        parts["model"] = {key: None if value == "" else value for key, value in model}
        parts["post_processor"] = whole.get("post_processor")
    parts["vocabulary"] = tokenizer.get_vocab()
    parts["special"] = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
