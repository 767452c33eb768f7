"""What every page of ours has to be, read back from its HTML."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from shearling.report.draw.markup import VOID

LOADING = {"src", "srcset", "data", "poster", "action", "background", "xlink:href", "href"}
SVG_LEAVES = {"path", "rect", "circle", "use", "line"}


class Page(HTMLParser):
    """Collects what the tests ask about, and checks that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.absent: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in LOADING:
                self.references.append(value or "")
            assert not name.startswith("on")
        if tag == "section" and ("class", "absent") in attrs:
            self.absent.append(dict(attrs)["aria-labelledby"] or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def require_self_contained(text: str, most_bytes: int) -> None:
    """No request goes out from the page, no script runs in it, and it is small."""
    read = Page(text)
    assert len(text.encode()) < most_bytes
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert all(reference.startswith("#") for reference in read.references)
    assert re.findall(r"url\((?!#)", text) == []
    assert not {"script", "link", "img", "iframe", "object"} & set(read.tags)


def require_targets(text: str) -> None:
    """Every reference within the page leads to one place."""
    read = Page(text)
    assert len(read.ids) == len(set(read.ids))
    targets = {reference.removeprefix("#") for reference in read.references}
    targets |= set(re.findall(r"url\(#([^)]+)\)", text))
    assert targets <= set(read.ids)
