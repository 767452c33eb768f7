"""What all sections share: their frame, and the quiet line of one that has nothing to show."""

from __future__ import annotations

import re

from shearling.report.draw.markup import Markup, el, join, render

COMMAND = re.compile(r"`([^`]+)`")


def section(title: str, *content: object) -> Markup:
    """A section with its heading in the margin."""
    name = title.lower().replace(" ", "-")
    return el("section", el("h2", title, id=name), el("div", *content), aria_labelledby=name)


def absent(title: str, sentence: str) -> Markup:
    """One quiet line in place of a section; `commands` stand between backquotes."""
    name = title.lower().replace(" ", "-")
    line = el("p", with_commands(sentence))
    return el("section", el("h2", title, id=name), line, class_="absent", aria_labelledby=name)


def with_commands(sentence: str) -> Markup:
    """A sentence of ours with what stands between backquotes set as code."""
    parts = COMMAND.split(sentence)
    return render([el("code", part) if n % 2 else part for n, part in enumerate(parts)])


def breakable(name: str) -> Markup:
    """A name that may be broken after a slash or an underscore, and so fits a narrow column."""
    parts = re.split(r"(?<=[/_])", name)
    return join(el("wbr"), parts)


def scroll(child: Markup, label: str) -> Markup:
    """A box that scrolls sideways by itself, so that a wide table never widens the page."""
    return el("div", child, class_="scroll", tabindex="0", role="region", aria_label=label)
