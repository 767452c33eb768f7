"""The studio's few addresses: the page, the models, a prompt to answer, and its end."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from shearling.errors import ShearlingError, misfit
from shearling.evaluate.generation import Sampling
from shearling.studio.conversation import Busy, Conversation
from shearling.studio.guard import Guard
from shearling.studio.page import build

T = TypeVar("T", bound=BaseModel)
MOST_BYTES = 1_000_000  # of a request


class Ask(BaseModel):
    """A prompt and how to answer it."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    chat: bool = False
    together: bool = False
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Stop(BaseModel):
    """Which prompt to leave."""

    model_config = ConfigDict(extra="forbid")

    run: int


def application(conversation: Conversation, *, host: str, together: bool) -> Starlette:
    """The server's application, bound to ``host``; ``together`` is the page's first choice."""
    page, headers = build()

    async def show(_: Request) -> Response:
        return HTMLResponse(page)

    async def models(_: Request) -> Response:
        described = [model.as_json() for model in conversation.models]
        return JSONResponse({"models": described, "together": together})

    async def run(request: Request) -> Response:
        ask = await _body(request, Ask)
        sampling = Sampling(ask.max_new_tokens, ask.temperature, ask.top_p, ask.seed)
        try:
            events = await conversation.ask(
                ask.prompt, sampling, chat=ask.chat, together=ask.together
            )
        except Busy:
            return _error("The models are answering another prompt; wait for it or stop it.", 503)
        return StreamingResponse(_lines(events), media_type="application/x-ndjson")

    async def stop(request: Request) -> Response:
        return JSONResponse({"stopped": conversation.stop((await _body(request, Stop)).run)})

    return Starlette(
        routes=[
            Route("/", show),
            Route("/api/models", models),
            Route("/api/run", run, methods=["POST"]),
            Route("/api/stop", stop, methods=["POST"]),
        ],
        middleware=[Middleware(Guard, host=host, headers=headers)],
        exception_handlers={ShearlingError: _refuse},
    )


async def _body(request: Request, kind: type[T]) -> T:
    """The request's body, checked.

    Raises:
        ShearlingError: too large, not JSON, a field that is unknown, missing or of a wrong type.
    """
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise ShearlingError(f"A request may have {MOST_BYTES:,} bytes; shorten the prompt.")
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "The request"
        raise ShearlingError(f"{field}: {misfit(first)}.") from error


async def _lines(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    async for event in events:
        yield json.dumps(event, ensure_ascii=False) + "\n"


async def _refuse(_: Request, error: Exception) -> Response:
    return _error(str(error), 400)


def _error(sentence: str, status: int) -> Response:
    return JSONResponse({"error": sentence}, status)
