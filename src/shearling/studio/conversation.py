"""Runs a prompt through the models, in turns or at once, one prompt at a time."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from starlette.concurrency import iterate_in_threadpool

from shearling.evaluate.generation import Sampling
from shearling.studio.worker import Job, Ready, as_json

PATIENCE = 5.0  # seconds that a prompt waits for the one before it, which may be ending


class Answers(Protocol):
    """What is asked of a worker; see :class:`shearling.studio.worker.StudioWorker`."""

    def answer(self, job: Job, /) -> Any:
        """Iterate over the events of a job."""
        ...

    def stop(self, number: int, /) -> None:
        """Let a job end early."""
        ...

    def kill(self) -> None:
        """End at once, whatever it does."""
        ...


@dataclass(frozen=True)
class StudioModel:
    """A model on the page."""

    name: str
    parameters: int
    ready: Ready
    worker: Answers

    def as_json(self) -> dict[str, Any]:
        """What the page says of it before it answers."""
        return {"name": self.name, "parameters": self.parameters} | asdict(self.ready)


class Busy(Exception):
    """Another prompt is being answered."""


class Conversation:
    """All models and the one prompt they are at."""

    def __init__(self, models: Sequence[StudioModel], *, patience: float = PATIENCE) -> None:
        """Talk to ``models``, which are loaded; a second prompt waits ``patience`` seconds."""
        self.models = list(models)
        self._patience = patience
        self._lock = asyncio.Lock()
        self._numbers = itertools.count(1)
        self._number = 0
        self._stopped = True
        self._running: set[int] = set()
        self._task: asyncio.Task[None] | None = None

    async def ask(
        self, prompt: str, sampling: Sampling, *, chat: bool, together: bool
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Start answering; the events for the page, of which each names its model.

        Who stops reading them stops the answers.

        Raises:
            Busy: the models are at another prompt.
        """
        try:
            async with asyncio.timeout(self._patience):
                await self._lock.acquire()
        except TimeoutError:
            raise Busy from None
        self._number, self._stopped = next(self._numbers), False
        events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        share = len(self.models) if together else 1
        jobs = [
            Job(self._number, prompt, chat and model.ready.chat, sampling, share)
            for model in self.models
        ]
        # A task of its own: the models must be heard to the end even if nobody reads any more.
        self._task = asyncio.create_task(self._run(jobs, together, events.put_nowait))
        return self._read(self._number, events)

    def stop(self, number: int | None = None) -> bool:
        """End the answers to prompt ``number``, or to any; False if it was over already."""
        if self._stopped or number not in (None, self._number):
            return False
        self._stopped = True
        for index in self._running:
            self.models[index].worker.stop(self._number)
        return True

    async def _read(
        self, number: int, events: asyncio.Queue[dict[str, Any] | None]
    ) -> AsyncGenerator[dict[str, Any], None]:
        try:
            yield {"type": "run", "run": number}
            while (event := await events.get()) is not None:
                yield event
            yield {"type": "over"}
        finally:
            self.stop(number)

    async def _run(
        self, jobs: Sequence[Job], together: bool, say: Callable[[dict[str, Any] | None], None]
    ) -> None:
        try:
            if together:
                await asyncio.gather(*(self._one(i, job, say) for i, job in enumerate(jobs)))
            else:
                for index, job in enumerate(jobs):
                    if not self._stopped:
                        await self._one(index, job, say)
        finally:
            self._stopped = True
            self._lock.release()
            say(None)

    async def _one(
        self, index: int, job: Job, say: Callable[[dict[str, Any] | None], None]
    ) -> None:
        self._running.add(index)
        try:
            say({"type": "start", "model": index, "chat": job.chat})
            async for event in iterate_in_threadpool(self.models[index].worker.answer(job)):
                say({"model": index} | as_json(event))
        finally:
            self._running.discard(index)
