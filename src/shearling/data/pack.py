"""Building a token store: shards of files to tokens, in parallel, then the shards to domains.

Every shard's tokens are kept below ``.unfinished`` in the store until all of it is there, with a
small file, written last, that says the shard is whole. So an interrupted run goes on where it
stopped, and neither that nor the number of workers shows in the result.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from shearling.data.domains import Source, find_domains
from shearling.data.encode import Encoder
from shearling.data.merge import merge
from shearling.data.records import MAX_LINE, SHARD_BYTES, split
from shearling.data.results import PackedDomain, PackedFile, StoreManifest, StoreTokenizer
from shearling.data.shards import ShardTask, tokenise
from shearling.data.store import MANIFEST, UNFINISHED, tokenizer_hash
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.files.reading import read_json
from shearling.files.unfinished import alone, kept_on_a_full_disk, withdrawn
from shearling.files.writer import check_output, file_digest, write_json
from shearling.model.manifest import versions

PLAN = "plan.json"
# Below this, other processes would take longer to start than one to do the work.
WORTH_WORKERS = 64_000_000


@dataclass(frozen=True)
class PackPlan:
    """What is to be packed, and how; a function of the options and the files alone."""

    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    name: str
    domains: Mapping[str, Sequence[Source]]
    length: int = 2048
    held_out: float = 0.02
    seed: int = 0
    bos: int | None = None
    max_line: int = MAX_LINE

    @staticmethod
    def of(
        specs: Sequence[str], tokenizer: PreTrainedTokenizerBase, name: str, *,
        length: int = 2048, held_out: float = 0.02, seed: int = 0, bos: bool | None = None,
        max_line: int = MAX_LINE,
    ) -> PackPlan:  # fmt: skip
        """Find the files of ``specs``; see :func:`shearling.data.domains.find_domains`.

        ``bos`` says whether every sequence and document begins with BOS; None follows the
        tokenizer.

        Raises:
            ShearlingError: the files or the numbers will not do, there is no EOS token, or no BOS
                token though ``bos`` is set.
        """
        if length < 2:
            raise ShearlingError(f"length is {length}, but a sequence has at least 2 tokens.")
        if not 0 <= held_out < 1:
            raise ShearlingError(
                f"held-out is {held_out}, but a share of the documents was expected, such as "
                "0.02; 0 holds nothing out."
            )
        begin = Encoder(tokenizer, bos).bos
        return PackPlan(
            tokenizer, name, find_domains(specs), length, held_out, seed, begin, max_line
        )

    @property
    def encoder(self) -> Encoder:
        """What makes tokens of records."""
        return Encoder(self.tokenizer, self.bos is not None)

    @property
    def bytes(self) -> int:
        """Size of all files, as they lie on the disk."""
        return sum(s.file.stat().st_size for group in self.domains.values() for s in group)

    @property
    def dtype(self) -> np.dtype:
        """Of the stored tokens: two bytes where the vocabulary fits, else four."""
        largest = max(self.tokenizer.get_vocab().values())
        return np.dtype("<u2") if largest < 2**16 else np.dtype("<u4")

    def describe(self, digests: Mapping[Path, str]) -> StoreManifest:
        """What makes a store this one and no other."""
        template = self.tokenizer.chat_template
        hashed = sha256(str(template).encode()).hexdigest() if template else None
        return StoreManifest(
            version=StoreManifest.VERSION,
            length=self.length,
            held_out=self.held_out,
            seed=self.seed,
            dtype=self.dtype.name,
            bos=self.bos,
            tokenizer=StoreTokenizer(
                name=self.name,
                sha256=tokenizer_hash(self.tokenizer),
                chat_template_sha256=hashed,
                eos=self.tokenizer.eos_token,
                bos=None if self.bos is None else self.tokenizer.bos_token,
            ),
            sources={
                domain: tuple(
                    PackedFile(s.name, s.file.stat().st_size, digests[s.file]) for s in sources
                )
                for domain, sources in self.domains.items()
            },
        )


def pack(
    plan: PackPlan, output: Path, *, workers: int | None = None, shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> dict[str, Any]:  # fmt: skip
    """Build the store, or finish one that was begun the same way; returns its manifest.

    Args:
        plan: what is packed.
        output: a new directory, or one where this plan was begun.
        workers: processes; by default one for each processor, or one where there is little to do.
        shard_bytes: of text, tokenised at one go; no matter to the result.
        progress: told the bytes read.

    Raises:
        ShearlingError: the output is taken, or was begun with other options or other files; a
            file cannot be read or a record is none; a domain is too small; the disk ran full; or
            a worker was killed. Only of the last two, and of what an earlier run began, is
            something left to go on with.
    """
    _check(output)
    unfinished = output / UNFINISHED
    if workers is None:
        workers = _processors() if plan.bytes >= WORTH_WORKERS else 1
    with kept_on_a_full_disk(output), alone(unfinished):
        described = plan.describe(_digests(plan, workers, progress))
        if (output / MANIFEST).is_file():
            manifest = _kept(output / MANIFEST)
            _require_same(output, described, manifest)
        else:
            if begun := (unfinished / PLAN).is_file():
                _require_same(output, described, _kept(unfinished / PLAN), begun=True)
            write_json(unfinished / PLAN, described.to_json())
            with _withdrawn(plan, output, begun):
                tasks = _tasks(plan, described, unfinished, shard_bytes)
                tokenise(tasks, plan.encoder, workers, progress)
                domains = _merge(tasks, plan, output, workers, progress)
            manifest = replace(described, domains=domains, versions=_versions())
            write_json(output / MANIFEST, manifest.to_json())
        shutil.rmtree(unfinished)
    return manifest.to_json()


def _kept(file: Path) -> StoreManifest:
    """A manifest or a plan that an earlier run wrote."""
    return StoreManifest.from_json(read_json(file, StoreManifest.advice), file)


def _check(output: Path) -> None:
    """The output is new, or a store of ours, finished or not."""
    if not (output / MANIFEST).is_file() and not (output / UNFINISHED).is_dir():
        check_output(output)


def _require_same(
    output: Path, wanted: StoreManifest, there: StoreManifest, *, begun: bool = False
) -> None:
    """Raise ShearlingError if what is in the output was packed otherwise, and say how.

    Where it was only begun, a file may have changed: a wrong line was mended, say. Shards know
    which file they are of.
    """
    differences = [
        f"{key} {getattr(there, key)} there and {getattr(wanted, key)} here"
        for key in ("version", "length", "held_out", "seed", "bos")
        if getattr(there, key) != getattr(wanted, key)
    ]
    # The name is left out: a directory may have moved. BOS is compared above.
    if replace(there.tokenizer, name="", bos="") != replace(wanted.tokenizer, name="", bos=""):
        differences.append("another tokenizer")
    sources = [
        {
            domain: [one.file if begun else (one.file, one.sha256) for one in files]
            for domain, files in described.sources.items()
        }
        for described in (wanted, there)
    ]
    differences += ["other files"] if sources[0] != sources[1] else []
    if differences:
        raise ShearlingError(
            f"output {output} exists and was packed otherwise ({', '.join(differences)}); name a "
            "new one, give the same options and files, or remove it."
        )


def _processors() -> int:
    with suppress(AttributeError):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _digests(plan: PackPlan, workers: int, progress: Progress) -> dict[Path, str]:
    """SHA-256 of every file. Threads do: hashing leaves the interpreter free."""
    files = [source.file for sources in plan.domains.values() for source in sources]
    digests: dict[Path, str] = {}
    done, total = 0, plan.bytes
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(file_digest, file): file for file in files}
        for future in as_completed(futures):
            digests[futures[future]] = future.result()
            done += futures[future].stat().st_size
            progress("hashing files", done, total)
    return digests


def _tasks(
    plan: PackPlan, described: StoreManifest, unfinished: Path, shard_bytes: int
) -> list[ShardTask]:
    """Every shard of every file, in the order in which the domains will hold them."""
    tasks: list[ShardTask] = []
    for domain, sources in plan.domains.items():
        (unfinished / domain).mkdir(exist_ok=True)
        for index, source in enumerate(sources):
            sha = described.sources[domain][index].sha256
            for shard in split(source.file, shard_bytes, max_line=plan.max_line):
                path = unfinished / domain / f"{index:06}-{shard.start:014}"
                tasks.append(ShardTask(domain, shard, sha, path, plan.dtype, plan.seed))
    return tasks


def _withdrawn(plan: PackPlan, output: Path, begun: bool) -> AbstractContextManager[None]:
    """Keep nothing where no shard was finished, nor of a run that its text refuses.

    What an earlier run began stays. One that was interrupted goes on when it is called again.
    """
    unfinished = output / UNFINISHED

    def keep(refused: bool) -> bool:
        return any(unfinished.glob("*/*.json")) and (begun or not refused)

    return withdrawn(unfinished, *(output / domain for domain in plan.domains), keep=keep)


def _merge(
    tasks: list[ShardTask], plan: PackPlan, output: Path, workers: int, progress: Progress
) -> dict[str, PackedDomain]:
    """The parts of every domain, in threads: copying and hashing leave the interpreter free."""

    def one(domain: str) -> PackedDomain:
        own = [task for task in tasks if task.domain == domain]
        packed = merge(
            domain, [task.path for task in own], output,
            length=plan.length, share=plan.held_out, dtype=plan.dtype, bos=plan.bos,
        )  # fmt: skip
        return replace(packed, left_out=sum(task.left_out() for task in own))

    packed: dict[str, PackedDomain] = {}
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(one, domain): domain for domain in plan.domains}
        for future in as_completed(futures):
            packed[futures[future]] = future.result()
            progress("packing domains", len(packed), len(futures))
    return dict(sorted(packed.items()))


def _versions() -> dict[str, str]:
    from shearling.version import __version__

    installed = versions()
    named = ("tokenizers", "transformers")
    return {"shearling": __version__} | {name: installed[name] for name in named}
