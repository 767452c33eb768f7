"""The documentation's site: every page has a place in it, and links stay inside."""

from __future__ import annotations

import re
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import shearling

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SITE = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]


def pages_in(nav: Any) -> list[str]:
    """The files that a tree of names and pages leads to."""
    if isinstance(nav, str):
        return [nav]
    values = nav.values() if isinstance(nav, dict) else nav
    return [page for inner in values for page in pages_in(inner)]


def test_every_page_has_one_place() -> None:
    assert sorted(pages_in(SITE["nav"])) == sorted(
        str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")
    )


def test_links_lead_to_files_of_the_docs() -> None:
    """The site has nothing else; `make check` also looks at the headings that links name."""
    wrong = []
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\(([^)\s#]+)", page.read_text(encoding="utf-8")):
            place = (page.parent / target).resolve()
            if "://" not in target and not (place.is_file() and place.is_relative_to(DOCS)):
                wrong.append(f"{page.relative_to(DOCS)}: {target}")
    assert wrong == []


def test_the_readme_leads_to_files() -> None:
    links = re.findall(r"\]\(([^)\s#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert [one for one in links if "://" not in one and not (ROOT / one).exists()] == []


def test_nothing_is_fetched_when_it_is_read() -> None:
    assert SITE["theme"]["font"] is False
    styles = [*SITE["extra_css"], *SITE.get("extra_javascript", [])]
    assert all((DOCS / file).is_file() for file in styles)
    assert not any("http" in (DOCS / file).read_text() for file in styles)


def test_every_public_name_is_in_the_reference() -> None:
    listed = re.findall(r"^::: (\S+)", (DOCS / "api/index.md").read_text(), re.MULTILINE)
    assert {name.rpartition(".")[2] for name in listed} == set(shearling.__all__) - {"__version__"}
    for name in listed:
        module, _, attribute = name.rpartition(".")
        assert getattr(import_module(module), attribute) is getattr(shearling, attribute)


def test_what_the_reference_names_exists() -> None:
    for page in (DOCS / "api").glob("*.md"):
        for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE):
            try:
                import_module(name)
            except ModuleNotFoundError:
                module, _, attribute = name.rpartition(".")
                assert hasattr(import_module(module), attribute), name
