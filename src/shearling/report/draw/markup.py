"""Builds HTML without ever pasting an unescaped string into it.

Whatever comes out of a result file is an ordinary ``str`` and is escaped on its way in; only
what these functions return is a :class:`Markup` and passes as it is.
"""

from __future__ import annotations

import html
from collections.abc import Iterable

VOID = frozenset({"br", "hr", "img", "link", "meta", "wbr"})
BLOCKS = frozenset(
    {"article", "details", "div", "figure", "footer", "h1", "h2", "h3", "header", "head", "li"}
    | {"body", "main", "ol", "p", "pre", "section", "table", "tbody", "thead", "tr", "ul"}
)


class Markup(str):
    """Text that already is HTML."""

    __slots__ = ()


def render(child: object) -> Markup:
    """Turn a child into HTML: markup as it is, nothing for None, everything else escaped."""
    if child is None:
        return Markup("")
    if isinstance(child, Markup):
        return child
    if isinstance(child, Iterable) and not isinstance(child, str | bytes):
        return Markup("".join(render(one) for one in child))
    return Markup(html.escape(str(child), quote=True))


def el(name: str, /, *children: object, **attributes: object) -> Markup:
    """One element. ``class_`` and ``aria_label`` become ``class`` and ``aria-label``.

    An attribute that is None or False is left out; one that is True has no value.
    """
    opening = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        attribute = key.rstrip("_").replace("_", "-")
        opening.append(attribute if value is True else f'{attribute}="{html.escape(str(value))}"')
    head = f"<{' '.join(opening)}>"
    if name in VOID:
        return Markup(head)
    tail = "\n" if name in BLOCKS else ""
    return Markup(f"{head}{render(children)}</{name}>{tail}")


def join(separator: str | Markup, children: Iterable[object]) -> Markup:
    """Render children with a separator between them."""
    return Markup(render(separator).join(render(child) for child in children))
