"""What describes a token store and a teacher's cache: the manifests that are written last."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from shearling.files.results import Misfit, Name, OwnFile, entry

DOMAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # a domain's name is that of a directory
DTYPES = ("uint16", "uint32")  # of stored tokens


def check_domains(names: Any) -> None:
    """Raise Misfit unless there are domains, and each is named as a directory can be."""
    if not names:
        raise Misfit("domains", "at least one domain", {})
    for name in names:
        if not DOMAIN.fullmatch(name):
            raise Misfit("domains", "names of letters, digits, '_', '-' and '.'", name)


@dataclass(frozen=True)
class PackedPart:
    """The sequences to train on, or those held out."""

    documents: int | None = entry(absent=None, omit=True)
    sequences: int = entry()
    tokens: int | None = entry("in those sequences", absent=None, omit=True)
    learned_tokens: int | None = entry("of them, whose loss counts", absent=None, omit=True)
    dropped_remainder: int | None = entry(
        "tokens at the end that fill no sequence", absent=None, omit=True
    )
    dropped_without_answer: int | None = entry(
        "tokens of sequences in which no loss would count", absent=None, omit=True
    )
    tokens_sha256: str | None = entry(absent=None, omit=True)
    mask_sha256: str | None = entry("where not every token is learned", absent=None, omit=True)


@dataclass(frozen=True)
class PackedDomain:
    """A domain of a store."""

    train: PackedPart = entry()
    held_out: PackedPart = entry()
    left_out: int | None = entry("blank records", absent=None, omit=True)
    held_out_end: int | None = entry(
        "tokens at the end of its longest document that are held out, where whole documents do "
        "not do", absent=None, omit=True,
    )  # fmt: skip


@dataclass(frozen=True)
class StoreTokenizer:
    """What made ids of text."""

    name: str = entry()
    sha256: str = entry()
    chat_template_sha256: str | None = entry(absent=None)
    eos: str | None = entry(absent=None)
    bos: str | None = entry("put before each document; null where none is", absent=None)


@dataclass(frozen=True)
class PackedFile:
    """A file that was packed."""

    file: str = entry()
    bytes: int = entry()
    sha256: str = entry()


@dataclass(frozen=True)
class StoreManifest(OwnFile):
    """Packed sequences of several domains; until it is finished, the plan of it."""

    kind: ClassVar[str] = "token-store"
    written_by: ClassVar[str] = "`pack`, as `store.json`, written last"
    advice: ClassVar[str] = "pack the text again with `shearling pack`"
    VERSION: ClassVar[int] = 1

    version: int = entry(str(VERSION))
    length: int = entry("tokens of a sequence")
    held_out: float | None = entry("share of the documents", absent=None)
    seed: int | None = entry(absent=None)
    dtype: str = entry("of the stored tokens: `uint16` or `uint32`, little-endian")
    bos: int | None = entry(
        "the token with which every sequence and every document begins; absent where none does",
        absent=None,
        omit=True,
    )
    tokenizer: StoreTokenizer = entry()
    sources: dict[str, tuple[PackedFile, ...]] = entry("files of each domain", absent={})
    domains: dict[str, PackedDomain] = entry("absent in a plan", absent={}, omit=True)
    versions: dict[str, str] = entry(absent={}, omit=True)

    def __post_init__(self) -> None:
        """Refuse sequences that predict nothing, and domains that are no directories."""
        if self.length < 2:
            raise Misfit("length", "a whole number of at least 2", self.length)
        if self.dtype not in DTYPES:
            raise Misfit("dtype", " or ".join(DTYPES), self.dtype)
        if self.domains:
            check_domains(self.domains)


@dataclass(frozen=True)
class OwnTextPlan(OwnFile):
    """What a model is to write, beside the batches of it that are done."""

    kind: ClassVar[str] = "own-text-plan"
    written_by: ClassVar[str] = "`write`, in `FILE.unfinished`, until `FILE` is whole"
    advice: ClassVar[str] = "remove the directory and run `shearling write` again"
    VERSION: ClassVar[int] = 1

    version: int = entry(str(VERSION))
    model: Name = entry()
    fingerprint: str = entry("of the model")
    sequences: int = entry()
    length: int = entry("tokens of each")
    seed: int = entry()
    head: tuple[int, ...] = entry("tokens with which all begin")
    template: bool = entry("whether these are a chat template's")
    text_sha256: str | None = entry("of the text that lends beginnings", absent=None)
    batch: int = entry("sequences written at a time")
    engine: str = entry("transformers or vllm", absent="transformers")

    def __post_init__(self) -> None:
        """Refuse another version, and what cannot be written."""
        if self.version != self.VERSION:
            raise Misfit("version", str(self.VERSION), self.version)
        for name in ("sequences", "length", "batch"):
            if getattr(self, name) < 1:
                raise Misfit(name, "a whole number of at least 1", getattr(self, name))


Parameters = Annotated[int, "a number of parameters"]


@dataclass(frozen=True)
class CachedTeacher:
    """The model whose distributions are kept."""

    name: Name = entry()
    fingerprint: str = entry()
    shape: dict[str, int] = entry("size by axis", absent={})
    parameters: Parameters | None = entry("tied ones once", absent=None)
    bytes: int | None = entry("of the tensors on disk", absent=None)


@dataclass(frozen=True)
class PredictedStore:
    """The store whose tokens were predicted."""

    name: Name = entry()
    fingerprint: str = entry()
    length: int = entry("tokens of a sequence")


@dataclass(frozen=True)
class FileFacts:
    """A file of a cache."""

    bytes: int = entry()
    sha256: str | None = entry(absent=None)


@dataclass(frozen=True)
class CacheManifest(OwnFile):
    """What a teacher says of every token of a store; until it is finished, the plan of it."""

    kind: ClassVar[str] = "teacher-cache"
    written_by: ClassVar[str] = "`teach`, as `teacher.json`, written last"
    advice: ClassVar[str] = "remove the directory and run `shearling teach` again"
    VERSION: ClassVar[int] = 1

    version: int = entry(str(VERSION))
    teacher: CachedTeacher = entry()
    store: PredictedStore = entry()
    domains: dict[str, int] = entry("sequences of each")
    top: int = entry("tokens kept of each distribution")
    vocab: int = entry("tokens that the teacher knows")
    shard_rows: int = entry("sequences of a file")
    versions: dict[str, str] = entry("absent in a plan", absent={}, omit=True)
    files: dict[str, FileFacts] = entry("absent in a plan", absent={}, omit=True)

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be, and files that are not those of the domains."""
        check_domains(self.domains)
        if self.store.length < 2:
            raise Misfit("store.length", "a whole number of at least 2", self.store.length)
        if not 1 <= self.vocab < 2**31:
            raise Misfit("vocab", "one of 1 to 2147483647 tokens", self.vocab)
        if not 1 <= self.top <= self.vocab:
            raise Misfit("top", f"one of 1 to {self.vocab} tokens", self.top)
        if self.shard_rows < 1:
            raise Misfit("shard_rows", "a whole number of at least 1", self.shard_rows)
        if not self.files:
            return
        count = sum(-(-rows // self.shard_rows) for rows in self.domains.values())
        if len(self.files) != count:
            raise Misfit("files", f"{count} files, one for every {self.shard_rows} sequences,",
                         f"{len(self.files)} of them")  # fmt: skip
        for domain, rows in self.domains.items():
            for first in range(0, rows, self.shard_rows):
                if shard_name(domain, first) not in self.files:
                    raise Misfit(f"files.{shard_name(domain, first)}", "the size of that file")


def shard_name(domain: str, first: int) -> str:
    """Where the sequences of a domain from ``first`` on lie in a cache."""
    return f"{domain}/{first:08}.safetensors"
