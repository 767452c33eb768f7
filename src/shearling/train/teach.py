"""A teacher walked once over a store, so that it need not be in memory while a model is healed.

Shapes: N sequences, B of a batch, S positions, P = S - 1 predictions, K tokens kept, T tokens,
V vocabulary, D hidden.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from shearling.data import teacher as caches
from shearling.data.pack import PLAN
from shearling.data.results import (
    CachedTeacher,
    CacheManifest,
    FileFacts,
    PredictedStore,
    shard_name,
)
from shearling.data.store import UNFINISHED, Store
from shearling.data.teacher import Cache, id_dtype, log_mass_outside
from shearling.engine.place import Place
from shearling.engine.ranks import Ranks
from shearling.engine.stream import BlockStream
from shearling.engine.walk import last_states
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.files.reading import read_json
from shearling.files.unfinished import alone, kept_on_a_full_disk, withdrawn
from shearling.files.writer import (
    check_output,
    check_space,
    disk_errors,
    file_digest,
    sync,
    sync_tree,
    write_json,
)
from shearling.model.checkpoint import Checkpoint
from shearling.model.manifest import describe, versions
from shearling.train.estimate import SPEEDS

TOP = 64
SHARD_BYTES = 32 * 2**20  # what an interruption may cost, in minutes, against the number of files
CHUNK = 128  # predictions ranked at a time


@dataclass(frozen=True)
class Cost:
    """What a cache takes: bytes on disk, tokens to run, and seconds at an assumed speed."""

    sequences: int
    tokens: int
    bytes: int
    assumed_seconds: float

    def as_json(self) -> dict[str, Any]:
        """Every figure."""
        return asdict(self)

    def as_text(self) -> str:
        """One line for a person."""
        return (
            f"{self.sequences:,} sequences of {self.tokens:,} tokens: {self.bytes / 1e9:,.2f} GB, "
            f"about {self.assumed_seconds / 3600:,.1f} h on two CPU cores (assumed)"
        )


def cost(teacher: Checkpoint, store: Store, top: int) -> Cost:
    """What ``teach`` will take, before it takes it; two FLOPs a parameter and token."""
    sequences = sum(len(store.sequences(domain)) for domain in store.domains)
    tokens = sequences * store.length
    return Cost(
        sequences, tokens, sequences * caches.row_bytes(store.length, top, teacher.shape["vocab"]),
        2.0 * teacher.parameters * tokens / SPEEDS["two CPU cores"],
    )  # fmt: skip


def check(
    teacher: Checkpoint, store: Store, output: Path, top: int, bos: bool | None = None
) -> None:
    """Refuse what cannot work before anything is loaded (ShearlingError)."""
    store.check_tokenizer(teacher.path, bos)
    vocab = teacher.shape["vocab"]
    if not 1 <= top <= vocab:
        raise ShearlingError(
            f"--top {top} was given, but {teacher.name} knows {vocab} tokens; keep 1 to {vocab}."
        )
    limit = getattr(teacher.config, "max_position_embeddings", None)
    if limit is not None and store.length > limit:
        raise ShearlingError(
            f"sequences of {store.length} tokens are longer than the {limit} positions of "
            f"{teacher.name}; pack the text with --length {limit}."
        )
    if not any((output / begun).exists() for begun in (caches.MANIFEST, UNFINISHED)):
        check_output(output)


def teach(
    teacher: Checkpoint, store: Store, output: Path, *, top: int = TOP, bos: bool | None = None,
    place: Place | None = None, progress: Progress = silent,
) -> Cache:  # fmt: skip
    """Keep a model's likeliest next tokens for every train sequence of a store.

    Computed in float32 as healing computes it. A run that was stopped goes on behind the last
    shard it finished; a cache that is done is left alone. Of several processes each runs its share
    of every shard's sequences, and the first one writes.

    Args:
        teacher: the model, streamed block by block where it does not fit in memory.
        store: packed text of the same tokenizer.
        output: a new directory, or one where the same was begun.
        top: tokens kept of each distribution; the mass of all others is kept as one number.
        bos: whether the store's sequences are to begin with BOS; None follows the tokenizer.
        place: where the teacher runs; chosen by the memory that is free, if not given.
        progress: told the sequences done.

    Raises:
        ShearlingError: data of another tokenizer, an output that is taken or was begun otherwise,
            logits that are not numbers, a full disk.
    """
    check(teacher, store, output, top, bos)
    store = store.within(teacher.shape["vocab"])
    place = place or Place.best(teacher)
    place.ranks.barrier()  # nothing is written before all have looked
    if place.ranks.first:
        _lead(teacher, store, output, top, place, progress)
    else:
        _follow(teacher, store, output, top, place)
    place.ranks.wait_for(output / caches.MANIFEST)
    return Cache.open(output)


def _lead(
    teacher: Checkpoint, store: Store, output: Path, top: int, place: Place, progress: Progress
) -> None:
    """What the first process does, which is also what one process alone does."""
    plan = _plan(teacher, store, top)
    unfinished = output / UNFINISHED
    with kept_on_a_full_disk(output), alone(unfinished), _withdrawn(output):
        begun = any(output.glob("[!.]*/*.safetensors"))
        for file in (output / caches.MANIFEST, unfinished / PLAN):
            if begun and file.is_file():
                values = read_json(file, CacheManifest.advice)
                _require_same(output, plan, CacheManifest.from_json(values, file))
        finished = (output / caches.MANIFEST).is_file()
        shards = [] if finished else _shards(store, plan.shard_rows)
        left = [shard for shard in shards if not (output / shard_name(*shard[:2])).is_file()]
        if not finished:
            rows = sum(count for *_, count in left)
            check_space(output, rows * caches.row_bytes(store.length, top, plan.vocab))
            write_json(unfinished / PLAN, plan.to_json())
        place.ranks.agreed(left)
        if left:
            total = sum(count for *_, count in shards)
            _compute(BlockStream(teacher, place), store, output, top, left, total, progress)
        if not finished:
            files = _described(output, [shard_name(*shard[:2]) for shard in shards], progress)
            whole = replace(plan, versions=versions(), files=files)
            write_json(output / caches.MANIFEST, whole.to_json())
        shutil.rmtree(unfinished)


def _withdrawn(output: Path) -> AbstractContextManager[None]:
    """Keep the plan of a run that is refused only where a shard was finished."""

    def keep(refused: bool) -> bool:
        return not refused or any(output.glob("[!.]*/*.safetensors"))

    return withdrawn(output / UNFINISHED, keep=keep)


def _follow(teacher: Checkpoint, store: Store, output: Path, top: int, place: Place) -> None:
    """What the other processes do: run their share of what the first one says is left."""
    left = [(domain, first, count) for domain, first, count in place.ranks.agreed([])]
    if left:
        walk = BlockStream(teacher, place)
        _compute(walk, store, output, top, left, sum(count for *_, count in left), silent)


def _plan(teacher: Checkpoint, store: Store, top: int) -> CacheManifest:
    """What makes a cache this one and no other."""
    vocab = teacher.shape["vocab"]
    bytes_of_row = caches.row_bytes(store.length, top, vocab)
    return CacheManifest(
        version=CacheManifest.VERSION,
        teacher=CachedTeacher(**describe(teacher)),
        store=PredictedStore(store.path.resolve().name, store.fingerprint, store.length),
        domains={domain: len(store.sequences(domain)) for domain in store.domains},
        top=top,
        vocab=vocab,
        shard_rows=max(1, SHARD_BYTES // bytes_of_row),
    )


def _require_same(output: Path, wanted: CacheManifest, made: CacheManifest) -> None:
    """Raise ShearlingError if the output was begun otherwise, and say how; names may differ."""

    def facts(plan: CacheManifest) -> dict[str, Any]:
        of = {"teacher": plan.teacher.fingerprint, "store": plan.store.fingerprint}
        return {key: getattr(plan, key) for key in ("version", "top", "shard_rows")} | of

    there, here = facts(made), facts(wanted)
    differing = [key for key in here if there[key] != here[key]]
    if differing:
        raise ShearlingError(
            f"output {output} exists and was made with another {' and '.join(differing)}; name a "
            "new one, or remove it."
        )


def _shards(store: Store, rows: int) -> list[tuple[str, int, int]]:
    """(domain, first sequence, how many) of every file."""
    return [
        (domain, first, min(rows, len(store.sequences(domain)) - first))
        for domain in store.domains
        for first in range(0, len(store.sequences(domain)), rows)
    ]


@torch.inference_mode()
def _compute(
    walk: BlockStream, store: Store, output: Path, top: int, left: Sequence[tuple[str, int, int]],
    total: int, progress: Progress,
) -> None:  # fmt: skip
    """Compute and write the shards that are left; each is there when it is whole."""
    name = walk.checkpoint.name
    done = float(total - sum(count for *_, count in left))
    for domain, first, count in left:
        ids_NS, _ = store.sequences(domain)[range(first, first + count)]
        ranks = walk.place.ranks.of(count)
        batches = walk.batches(ranks.share(ids_NS))

        def tell(number: int, batches: Sequence[Tensor] = batches, ranks: Ranks = ranks) -> None:
            nonlocal done
            done += ranks.size * len(batches[number]) / (walk.depth + 1)
            progress(f"running {name}", min(round(done, 2), total), total)

        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        with walk.place.running():
            states = last_states(walk, batches, tell)
            for number, (ids_BS, h_BSD) in enumerate(zip(batches, states, strict=True)):
                parts += _likeliest(walk, ids_BS, h_BSD, top)
                tell(number)
        ids_NPK, logp_NPK, rest_NP = (
            ranks.gather(torch.cat(each), count) for each in zip(*parts, strict=True)
        )
        if not rest_NP.isfinite().all() or logp_NPK.isnan().any():
            raise ShearlingError(
                f"{name} computes values that are not numbers on the domain {domain}; "
                "check its weights."
            )
        if walk.place.ranks.first:
            _write(output, shard_name(domain, first), ids_NPK, logp_NPK, rest_NP)


def _likeliest(
    walk: BlockStream, ids_BS: Tensor, h_BSD: Tensor, top: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Ids (B, P, K), log-probabilities and the rest (B, P), as stored, a slice of B at a time."""
    vocab = walk.checkpoint.shape["vocab"]
    for ids, h in walk.slices(ids_BS, h_BSD):
        slices = []
        for logits_TV in walk.logits(h, ids)[:, :-1].flatten(0, 1).float().split(CHUNK):
            norm_T1 = logits_TV.logsumexp(-1, keepdim=True)
            logits_TK, ids_TK = logits_TV.topk(top)
            rest_T = (log_mass_outside(logits_TV, ids_TK) - norm_T1.squeeze(-1)).exp()
            slices.append((ids_TK, logits_TK - norm_T1, rest_T))
        ids_TK, logp_TK, rest_T = (torch.cat(each).cpu() for each in zip(*slices, strict=True))
        shape = (len(ids), -1, top)
        yield (
            ids_TK.to(torch.int32).to(id_dtype(vocab)).view(shape),
            logp_TK.to(torch.float16).view(shape),
            rest_T.view(shape[:2]),
        )


def _write(output: Path, name: str, ids: Tensor, logp: Tensor, rest: Tensor) -> None:
    staged, final = output / UNFINISHED / Path(name).name, output / name
    final.parent.mkdir(exist_ok=True)
    try:
        with disk_errors(final):
            save_file({"ids": ids, "logp": logp, "rest": rest}, staged)
            sync_tree(staged.parent)
            os.replace(staged, final)
    finally:
        staged.unlink(missing_ok=True)
    sync(final.parent)


def _described(output: Path, names: Sequence[str], progress: Progress) -> dict[str, FileFacts]:
    described = {}
    for number, name in enumerate(names, 1):
        file = output / name
        described[name] = FileFacts(bytes=file.stat().st_size, sha256=file_digest(file))
        progress("hashing files", number, len(names))
    return described
