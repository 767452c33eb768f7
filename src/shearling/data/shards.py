"""Shards of files to tokens on disk, in as many processes as wanted; a finished one stays."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shearling.data.encode import Encoder
from shearling.data.merge import DOCUMENT
from shearling.data.records import Document, Record, Shard, digest, read
from shearling.errors import ShearlingError
from shearling.files.progress import Progress
from shearling.files.reading import read_json
from shearling.files.unfinished import StoppedError
from shearling.files.writer import write_json

# Tokenised at a time.
BATCH_RECORDS, BATCH_CHARACTERS = 512, 1_000_000


@dataclass(frozen=True)
class ShardTask:
    """A shard of a domain's text, and where its tokens go.

    ``path`` with ``.ids`` are the tokens in ``dtype``; with ``.documents`` each document's digest
    (which depends on the seed) and number of tokens; with ``.mask``, only where not everything is
    learned, a byte for each token; and with ``.json``, written last, that the others are whole.
    """

    domain: str
    shard: Shard
    sha256: str
    path: Path
    dtype: np.dtype
    seed: int

    @property
    def described(self) -> dict[str, Any]:
        """What the tokens are made from, but for what the whole plan has in common."""
        return {"sha256": self.sha256, "start": self.shard.start, "stop": self.shard.stop}

    def left_out(self) -> int:
        """Blank records that were passed over, of a shard that is finished."""
        return self._described().get("left_out", 0)

    def finished(self) -> bool:
        """Whether the shard is whole: its description is written last, and tells of its files."""
        described = self._described()
        if described.get("shard") != self.described or type(described.get("left_out")) is not int:
            return False
        ids, documents = Path(f"{self.path}.ids"), Path(f"{self.path}.documents")
        mask = Path(f"{self.path}.mask")
        if not (ids.is_file() and documents.is_file()):
            return False
        if documents.stat().st_size % DOCUMENT.itemsize:
            return False
        tokens = int(np.fromfile(documents, "<u8")[1::2].sum())  # the second half of DOCUMENT
        masked = mask.stat().st_size if mask.is_file() else tokens
        return (ids.stat().st_size, masked) == (tokens * self.dtype.itemsize, tokens)

    def _described(self) -> dict[str, Any]:
        """What was said of the shard when it was finished; nothing where that cannot be read."""
        file = Path(f"{self.path}.json")
        try:
            return read_json(file) if file.is_file() else {}
        except ShearlingError:  # it is made again
            return {}


def tokenise(tasks: list[ShardTask], encoder: Encoder, workers: int, progress: Progress) -> None:
    """Do the tasks that no earlier run finished.

    Raises:
        ShearlingError: a file or a record will not do, or a worker was killed.
    """
    total = sum(task.shard.size for task in tasks)
    left = [task for task in tasks if not task.finished()]
    done = total - sum(task.shard.size for task in left)
    with closing(_results(left, encoder, min(workers, len(left)))) as results:
        for task in results:
            done += task.shard.size
            progress("tokenising", done, total)


def _results(tasks: list[ShardTask], encoder: Encoder, workers: int) -> Generator[ShardTask]:
    """The tasks as they get done."""
    if workers <= 1:
        for task in tasks:
            _write(task, encoder, lambda: False)
            yield task
        return
    # Forked from this process, with its threads, a worker could hang; a fresh one imports anew.
    fresh = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if fresh else "spawn")
    if fresh:
        context.set_forkserver_preload([__name__])
    stop = context.Event()
    with ProcessPoolExecutor(workers, context, _begin, (encoder, stop)) as pool:
        try:
            futures: dict[Future[None], ShardTask] = {
                pool.submit(_work, task): task for task in tasks
            }
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BrokenProcessPool as error:
            raise StoppedError(
                "a worker process was killed, most likely for want of memory; what is finished is "
                "kept, so give the same command again with fewer --workers."
            ) from error
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


_encoder: Encoder
_stop: Any


def _begin(encoder: Encoder, stop: Any) -> None:
    """Make this process a worker."""
    global _encoder, _stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told as well, and tells us
    # There is a process for every processor already.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder, _stop = encoder, stop
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed tells nobody, and we would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(task: ShardTask) -> None:
    _write(task, _encoder, _stop.is_set)


def _write(task: ShardTask, encoder: Encoder, stopped: Callable[[], bool]) -> None:
    """Write a shard's tokens; the last file to appear says that the others are whole."""
    table: list[tuple[int, int]] = []
    left_out = written = 0
    masked = Path(f"{task.path}.mask")
    masked.unlink(missing_ok=True)
    with ExitStack() as stack:
        ids_file = stack.enter_context(open(f"{task.path}.ids", "wb"))
        files = [ids_file]
        for batch, blank in _batches(task.shard):
            if stopped():
                raise ShearlingError("the work was stopped.")
            left_out += blank
            encoded = encoder(batch, task.shard.where)
            for (_, record), (ids, mask) in zip(batch, encoded, strict=True):
                if mask is not None and len(files) == 1:
                    files.append(stack.enter_context(masked.open("wb")))
                    _ones(files[1], written)  # all before it was learned
                if len(files) == 2:
                    _ones(files[1], len(ids)) if mask is None else files[1].write(mask.tobytes())
                ids_file.write(ids.astype(task.dtype).tobytes())
                table.append((digest(record, task.seed), len(ids)))
                written += len(ids)
        files.append(stack.enter_context(open(f"{task.path}.documents", "wb")))
        files[-1].write(np.array(table, dtype=DOCUMENT).tobytes())
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    write_json(Path(f"{task.path}.json"), {"shard": task.described, "left_out": left_out})


def _ones(file: Any, count: int) -> None:
    for start in range(0, count, 1 << 20):
        file.write(b"\1" * min(count - start, 1 << 20))


def _batches(shard: Shard) -> Iterator[tuple[list[tuple[int, Record]], int]]:
    """Records to be tokenised together, and how many blank ones were passed over with them."""
    batch: list[tuple[int, Record]] = []
    characters = blank = 0
    for number, record in read(shard):
        if record is None:
            blank += 1
            continue
        batch.append((number, record))
        characters += len(record.text) if isinstance(record, Document) else 0
        if len(batch) == BATCH_RECORDS or characters >= BATCH_CHARACTERS:
            yield batch, blank
            batch, characters, blank = [], 0, 0
    yield batch, blank
