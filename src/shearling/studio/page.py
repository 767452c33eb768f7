"""The one page of the studio, and the policy under which a browser runs it."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from importlib.resources import files


def build() -> tuple[str, dict[str, str]]:
    """The page, self-contained, and the headers it is sent with.

    Its own script and style run by their hash; it loads nothing and talks to its server alone.
    """
    folder = files("shearling.studio")
    style, script, page = (
        (folder / name).read_text(encoding="utf-8")
        for name in ("style.css", "studio.js", "page.html")
    )
    page = page.replace("/* style.css */", style).replace("/* studio.js */", script)
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return page, {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-store",
    }


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
