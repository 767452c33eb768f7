"""One model in a process of its own, so that its memory is its own; it answers one job at a time.

Nothing but small dataclasses of numbers and strings crosses the pipe between the two processes.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shearling.errors import ShearlingError
from shearling.evaluate.generation import Sampling, continuation, encode, new_tokens
from shearling.files.child import Child
from shearling.model.loading import load_model, load_tokenizer, longest_input

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a character decodes to before its last byte


@dataclass(frozen=True)
class Job:
    """One prompt to answer; ``share`` models answer at once and divide the threads."""

    number: int
    prompt: str
    chat: bool
    sampling: Sampling
    share: int = 1


@dataclass(frozen=True)
class Ready:
    """What a loaded model is.

    Attributes:
        weight_bytes: of all parameters and buffers in memory, tied ones once.
        resident_bytes: of the whole process, Python and its libraries included.
        chat: whether the tokenizer has a chat template.
        positions: longest prompt and answer together, or None where there is no limit.
    """

    weight_bytes: int
    resident_bytes: int
    chat: bool
    positions: int | None


@dataclass(frozen=True)
class Piece:
    """What was added to the answer, and how many tokens it has by now."""

    text: str
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Done:
    """How an answer came about.

    Attributes:
        text: the whole answer.
        prompt_tokens, tokens: read and written.
        first_seconds: until the first token; None where there is none.
        tokens_per_s: of those after the first; None below two. Only time in the model counts.
        resident_bytes: of the process, the most seen after any token, KV cache included.
        ended: ``end`` of text, ``length`` reached, or ``stopped`` by the user.
    """

    text: str
    prompt_tokens: int
    tokens: int
    first_seconds: float | None
    tokens_per_s: float | None
    resident_bytes: int
    ended: str


@dataclass(frozen=True)
class Failed:
    """Why there is no answer, in one sentence."""

    message: str


Event = Piece | Done | Failed
TYPES: dict[type, str] = {Piece: "text", Done: "done", Failed: "failed"}  # to the page


def as_json(event: Event | Ready) -> dict[str, Any]:
    """An event for the page: its kind in lower case, and its fields."""
    return {"type": TYPES[type(event)]} | asdict(event)


class StudioWorker:
    """The process of one model. It loads at once; wait for it with :meth:`ready`."""

    def __init__(
        self, path: Path, *, dtype: str = "float32", device: str = "cpu", threads: int | None = None
    ) -> None:
        """Start the process; ``threads`` are torch's on CPU, None leaving its own choice."""
        self.path = path
        self._child = Child(
            _serve, path, dtype, device, threads,
            died=lambda code: (
                f"The process of the model in {path} ended with exit code {code}; if memory ran "
                "out (code -9), open fewer models or give --dtype bfloat16, and start the studio "
                "again."
            ),
        )  # fmt: skip

    def ready(self) -> Ready:
        """Wait until the model is loaded.

        Raises:
            ShearlingError: it cannot be, or its process died.
        """
        answer = self._child.receive()
        if isinstance(answer, Failed):
            raise ShearlingError(answer.message)
        return answer

    def answer(self, job: Job) -> Iterator[Event]:
        """Start a job at once: its text as it is written, then one Done or Failed.

        Read it to the end before the next job, if need be after a :meth:`stop`.
        """
        try:
            self._child.send(job)
        except ShearlingError as error:
            return iter([Failed(str(error))])
        return self._events()

    def _events(self) -> Iterator[Event]:
        try:
            while True:
                event = self._child.receive()
                yield event
                if not isinstance(event, Piece):
                    return
        except ShearlingError as error:
            yield Failed(str(error))

    def stop(self, number: int) -> None:
        """Let job ``number`` end after the token it is at; without effect once it has ended."""
        try:
            self._child.send(number)
        except ShearlingError:  # what died has stopped
            return

    def kill(self) -> None:
        """End the process, whatever it does; who waits for its answer hears that it ended."""
        self._child.kill()

    def close(self) -> None:
        """End the process and let go of it; nobody may wait for an answer any more."""
        self._child.close()

    @property
    def pid(self) -> int | None:
        """The process's id."""
        return self._child.pid


def _serve(
    connection: Connection, path: Path, dtype: str, device: str, threads: int | None
) -> None:
    """The process's life: load, say so, then answer jobs until the parent is gone."""
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        threads = torch.get_num_threads()
        try:
            model = load_model(path, dtype=dtype, device=device)
            tokenizer = load_tokenizer(path)
            _warm_up(model, tokenizer)
        except Exception as error:
            connection.send(Failed(_sentence(error)))
            return
        connection.send(
            Ready(
                weight_bytes(model),
                _resident_bytes(),
                bool(tokenizer.chat_template),
                longest_input(model.config),
            )
        )
        while True:
            message = connection.recv()
            if isinstance(message, Job):  # anything else would stop what has ended already
                torch.set_num_threads(max(1, threads // message.share))
                _answer(connection, model, tokenizer, message)
    except (EOFError, OSError):  # the parent is gone
        return


def _warm_up(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Touch every weight and start the threads, which the first answer would be timed with."""
    for _ in new_tokens(model, tokenizer, [0], Sampling(max_new_tokens=2)):
        pass


def _answer(
    connection: Connection, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, job: Job
) -> None:
    try:
        for event in _events(connection, model, tokenizer, job):
            connection.send(event)
    except (EOFError, BrokenPipeError, ConnectionError):
        raise
    except Exception as error:
        connection.send(Failed(_sentence(error)))


def _events(
    connection: Connection, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, job: Job
) -> Generator[Event]:
    """Text as it is written, then Done. Time spent here, not in the model, is not counted."""
    started = time.perf_counter()
    ids = encode(model, tokenizer, job.prompt, job.sampling.max_new_tokens, chat=job.chat)
    tokens = new_tokens(model, tokenizer, ids, job.sampling)
    overhead, first, last, resident = 0.0, None, 0.0, 0
    written: list[int] = []
    shown, ended = "", "length"
    for token in tokens:
        last = time.perf_counter() - started - overhead
        first = last if first is None else first
        written.append(token)
        entered = time.perf_counter()
        resident = max(resident, _resident_bytes())
        text = continuation(tokenizer, ids, written)
        if not text.endswith(_UNFINISHED) and text.startswith(shown):
            yield Piece(text[len(shown) :], len(written), last)
            shown = text
        if _stopped(connection, job.number):
            ended = "stopped"
            break
        overhead += time.perf_counter() - entered
    else:
        ended = "length" if len(written) == job.sampling.max_new_tokens else "end"
    rate = (len(written) - 1) / (last - first) if first is not None and last > first else None
    text = continuation(tokenizer, ids, written)
    resident = max(resident, _resident_bytes())
    yield Done(text, len(ids), len(written), first, rate, resident, ended)


def _stopped(connection: Connection, number: int) -> bool:
    """Whether the parent asked to stop this job; EOFError if there is no parent any more."""
    while connection.poll():
        if connection.recv() == number:
            return True
    return False


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, those that share storage once."""
    storages: dict[tuple[int, int], int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        for plain in _plain(tensor):
            storage = plain.untyped_storage()
            storages[storage.data_ptr(), storage.nbytes()] = plain.numel() * plain.element_size()
    return sum(storages.values())


def _plain(tensor: Any) -> Iterable[torch.Tensor]:
    """The tensors a tensor is made of: a quantised one is several."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [plain for name in names for plain in _plain(getattr(tensor, name))]


def _resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def _sentence(error: Exception) -> str:
    if isinstance(error, ShearlingError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
