"""Who may talk to a server without a password: pages it served itself, and nobody else's.

A page of another site can send requests to a loopback address, and by DNS rebinding can even read
the answers under a name of its own. So the name in ``Host`` must be this machine's, and a request
that does something must come from a page of the same origin.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class Guard:
    """Middleware: refuses strangers, and adds ``headers`` to every response."""

    def __init__(self, app: ASGIApp, host: str, headers: Mapping[str, str]) -> None:
        """Guard ``app``, whose server is bound to the address or name ``host``."""
        self.app, self.headers = app, headers
        self.loopback = is_loopback(host)
        self.names = {"localhost"} | (
            set() if self.loopback else {host.lower(), socket.gethostname().lower()}
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a stranger with 403, and pass all others on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        reason = self.refusal(scope["method"], Headers(scope=scope))
        app = JSONResponse({"error": reason}, 403) if reason else self.app
        await app(scope, receive, with_headers)

    def refusal(self, method: str, headers: Mapping[str, str]) -> str | None:
        """Why a request is not answered, or None where it is."""
        host = headers.get("host", "")
        if not self._own(host):
            return (
                f"The host {host!r} is not this server's; open the address that the studio printed."
            )
        if method in _SAFE_METHODS:
            return None
        origin = headers.get("origin")
        foreign = origin is not None and urlsplit(origin).netloc.lower() != host.lower()
        if foreign or headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return f"The request comes from another site ({origin}), which may not use the studio."
        if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            return "The content type must be application/json."
        return None

    def _own(self, host: str) -> bool:
        """Whether a Host header names this server.

        Rebinding needs a name, so that an address is always safe where the server is meant to be
        reached from elsewhere; on loopback only loopback addresses are.
        """
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self.names:
            return True
        return is_loopback(name) if self.loopback else _is_address(name)


def is_loopback(host: str) -> bool:
    """Whether an address or name can be reached from this machine alone."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
