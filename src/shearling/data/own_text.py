"""Text that a model writes itself, as documents in a .jsonl file: calibration or training text.

It can be had without end, and is what the model knows, whatever the text at hand is about.
Sequences of one length are drawn from the model's own distribution at temperature 1, as many at
once as memory allows, each by a generator of its own: a sequence is the same in any batch, but for
the rounding of products. Batches that are done lie in a directory beside the output until all are,
so that a run that was stopped goes on, to the bytes of one that was not.

Shapes: B sequences of S tokens, of which T are drawn.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shearling.data.authors import Author, ResidentAuthor
from shearling.data.documents import documents
from shearling.data.results import OwnTextPlan
from shearling.data.seeds import folded
from shearling.data.starts import TextStarts
from shearling.engine.place import Place
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.files.reading import read_json
from shearling.files.staging import check_file
from shearling.files.unfinished import alone, kept_on_a_full_disk, withdrawn
from shearling.files.writer import check_space, sync, write_json, write_text
from shearling.model.checkpoint import Checkpoint

PLAN = "plan.json"
BYTES = 6  # on disk for a token: what English takes, and half as much again
_BATCH = re.compile(r"(\d{8,})-(\d{8,})\.jsonl")  # its first sequence, and the one behind its last


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnText:
    """What is to be written.

    Attributes:
        tokens: at least so many, in whole sequences.
        length: tokens of a sequence, beginnings included.
        seed: of every draw.
        bos: whether sequences begin with BOS; None follows the tokenizer.
        template: whether each begins as the chat template begins a user's turn.
        begin_from: text of which each begins with a few tokens; a file or a directory.
        batch: sequences at a time; None for as many as memory allows.
    """

    tokens: int
    length: int = 512
    seed: int = 0
    bos: bool | None = None
    template: bool = False
    begin_from: Path | None = None
    batch: int | None = None

    @property
    def sequences(self) -> int:
        """How many there are."""
        return -(-self.tokens // self.length)


class OwnTextRun:
    """Text being written: what is there, what is left, and how it is made.

    Args:
        source: the model.
        wanted: what is to be written.
        output: the file; what is done waits in a directory beside it.
        author: what has the model write.

    Raises:
        ShearlingError: a model that the author cannot have write, sequences longer than it reads,
            beginnings that cannot be, an output that is taken or was begun otherwise.
    """

    def __init__(self, source: Checkpoint, wanted: OwnText, output: Path, author: Author) -> None:
        """Check all that can be checked before any work is done."""
        self.source, self.wanted, self.output, self.author = source, wanted, output, author
        self.kept_in = output.with_name(f"{output.name}.unfinished")
        self._check()
        texts = () if wanted.begin_from is None else documents(wanted.begin_from)
        order = torch.Generator().manual_seed(wanted.seed)
        shuffled = [texts[n] for n in torch.randperm(len(texts), generator=order).tolist()]
        self.openings = TextStarts.of(
            source.tokenizer(), source.shape["vocab"],
            texts=shuffled, bos=wanted.bos, template=wanted.template,
        )  # fmt: skip
        if self.openings.length >= wanted.length:
            raise ShearlingError(
                f"--length {wanted.length} was given, but sequences begin with "
                f"{self.openings.length} tokens; give more than those."
            )
        digest = None if not texts else hashlib.sha256("\0".join(texts).encode()).hexdigest()
        self.plan = OwnTextPlan(
            version=OwnTextPlan.VERSION, model=source.name, fingerprint=source.fingerprint,
            sequences=wanted.sequences, length=wanted.length, seed=wanted.seed,
            head=self.openings.head, template=wanted.template, text_sha256=digest,
            batch=wanted.batch or self._batch(), engine=author.engine,
        )  # fmt: skip

    def _check(self) -> None:
        source, output = self.source, self.output
        check_file(output)
        if output.suffix != ".jsonl":
            raise ShearlingError(
                f"--output {output} was given, but documents are written as .jsonl; name it so."
            )
        if output.exists() and not self.kept_in.is_dir():
            raise ShearlingError(f"output {output} exists; name a new file, or remove it.")
        self.author.check(source)
        limit = getattr(source.config, "max_position_embeddings", None)
        if limit is not None and self.wanted.length > limit:
            raise ShearlingError(
                f"--length {self.wanted.length} was given, but {source.name} reads {limit} tokens "
                f"at most; give a --length of at most {limit}."
            )

    def _batch(self) -> int:
        """Sequences at a time: as many as the author takes, about as many each time."""
        most = self.author.at_once(self.source, self.wanted.length)
        return -(-self.wanted.sequences // -(-self.wanted.sequences // most))

    @cached_property
    def begun(self) -> OwnTextPlan:
        """The plan of the run that is gone on with, or the new one.

        A batch's size is the earlier run's unless it is given: products round by it.

        Raises:
            ShearlingError: what was begun there is something else.
        """
        file = self.kept_in / PLAN
        if not file.is_file():
            return self.plan
        there = read_plan(file)
        ours, theirs = asdict(self.plan), asdict(there)
        differing = [
            key for key in ours if key not in ("batch", "model") and ours[key] != theirs[key]
        ]
        if differing:
            raise ShearlingError(
                f"output {self.output} was begun with another {' and '.join(differing)}; give the "
                f"same options, name a new file, or remove {self.kept_in}."
            )
        return self.plan if self.wanted.batch else there

    @property
    def done(self) -> int:
        """Sequences that are kept already."""
        done = 0
        for first, behind, _ in self._batches():
            if first == done:
                done = behind
        return done

    def _batches(self) -> list[tuple[int, int, Path]]:
        """What is kept: first sequence, the one behind the last, and the file; in order."""
        if not self.kept_in.is_dir():
            return []
        named = [(_BATCH.fullmatch(file.name), file) for file in self.kept_in.iterdir()]
        return sorted((int(name[1]), int(name[2]), file) for name, file in named if name)

    def write(self, progress: Progress = silent) -> dict[str, Any]:
        """Write what is left, and put the file together.

        Args:
            progress: told the tokens done.

        Returns:
            What was written: ``sequences``, ``tokens``, ``documents``, ``bytes``, ``sha256`` and
            the plan's entries.

        Raises:
            ShearlingError: another process writes it, or the disk ran full.
        """
        with kept_on_a_full_disk(self.output), alone(self.kept_in, self.output):
            plan = self.begun
            with withdrawn(self.kept_in, keep=lambda no: not no or bool(self._batches())):
                left = plan.sequences - self.done
                check_space(self.output, 2 * left * plan.length * BYTES)
                write_json(self.kept_in / PLAN, plan.to_json())
                if left:
                    self._write_batches(plan, progress)
                result = plan.to_json() | {"tokens": plan.sequences * plan.length} | self._joined()
            shutil.rmtree(self.kept_in)
        sync(self.output.absolute().parent)
        return result

    def _write_batches(self, plan: OwnTextPlan, progress: Progress) -> None:
        total = plan.sequences * plan.length
        with self.author.writing(self.source, plan.length, plan.batch) as write_batch:
            for first in range(self.done, plan.sequences, plan.batch):
                behind = min(first + plan.batch, plan.sequences)
                ids_BS, at_BT = self.batch(first, behind)
                given = plan.length - at_BT.shape[1]

                def tell(step: int, first: int = first, rows: int = behind - first,
                         given: int = given) -> None:  # fmt: skip
                    progress("writing text", first * plan.length + rows * (given + step), total)

                rows = write_batch(ids_BS, at_BT, tell).tolist()
                lines = [line for ids in rows for line in self._lines(ids)]
                write_text(self.kept_in / f"{first:08}-{behind:08}.jsonl", "".join(lines))

    def batch(self, first: int, behind: int) -> tuple[Tensor, Tensor]:
        """Sequences (B, S) with their beginnings, and the draws (B, T) of what follows."""
        begin, length = self.openings.length, self.wanted.length
        ids_BS = torch.zeros(behind - first, length, dtype=torch.long)
        draws = []
        for row, number in enumerate(range(first, behind)):
            seed = folded(self.wanted.seed * 1_000_003 + number)
            generator = torch.Generator().manual_seed(seed)
            ids_BS[row, :begin] = torch.tensor(self.openings.tokens(number, generator))
            draws.append(torch.rand(length - begin, generator=generator))
        return ids_BS, torch.stack(draws)

    def _lines(self, ids: list[int]) -> Iterator[str]:
        for text in self.openings.documents(ids):
            yield json.dumps({"text": text}, ensure_ascii=False) + "\n"

    def _joined(self) -> dict[str, Any]:
        """The output made of all batches, whole or not at all; documents, bytes and SHA-256."""
        whole, digest, lines = self.kept_in / "whole", hashlib.sha256(), 0
        with whole.open("wb") as joined:
            for _, _, file in self._batches():
                content = file.read_bytes()
                joined.write(content)
                digest.update(content)
                lines += content.count(b"\n")
            joined.flush()
            os.fsync(joined.fileno())
            size = joined.tell()
        os.replace(whole, self.output)
        return {"documents": lines, "bytes": size, "sha256": digest.hexdigest()}


def read_plan(file: Path) -> OwnTextPlan:
    """The plan of a run that was stopped.

    Raises:
        ShearlingError: it is damaged, or of another version.
    """
    return OwnTextPlan.from_json(read_json(file, OwnTextPlan.advice), file)


def write_own_text(
    source: Checkpoint, wanted: OwnText, output: Path, *, author: Author | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:  # fmt: skip
    """Have a model write text; see :class:`OwnTextRun`.

    Args:
        source: the model.
        wanted: what is to be written.
        output: a new .jsonl file, or that of a run to go on with.
        author: what has the model write; by default the model in this process, at a place chosen
            by the memory that is free.
        progress: told the tokens done.
    """
    author = author or ResidentAuthor(Place.best(source))
    return OwnTextRun(source, wanted, output, author).write(progress)
