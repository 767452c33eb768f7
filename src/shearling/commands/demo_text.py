"""Text for the demo, read from what every machine has: Python's own documentation.

English prose from ``pydoc_data.topics`` (chapters of the language reference) and from the long
docstrings of the standard library, whose sources are parsed and never imported. Code, tables and
grammar are left out, markup is taken off, and a paragraph that occurs twice is kept once, so the
held-out documents share none with the others. One installation of Python always gives one text.
"""

from __future__ import annotations

import ast
import json
import re
import sysconfig
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from shearling.errors import ShearlingError

LONG_DOCSTRING = 400  # characters, before code and markup are taken out
SHORTEST_DOCUMENT = 240  # characters of prose
HELD_OUT_EVERY = 10

# Modules with long docstrings, in a fixed order; one that this Python lacks is passed over.
# fmt: off
MODULES = (
    "_pydecimal", "_pyio", "argparse", "ast", "asyncio.base_events", "asyncio.events",
    "asyncio.locks", "asyncio.protocols", "asyncio.runners", "asyncio.streams", "asyncio.tasks",
    "base64", "bdb", "calendar", "cmd", "code", "codecs", "collections", "collections.abc",
    "_collections_abc", "compileall", "concurrent.futures", "concurrent.futures._base",
    "concurrent.futures.process", "configparser", "contextlib", "copy", "csv", "ctypes.util",
    "dataclasses", "datetime", "_pydatetime", "_strptime", "difflib", "dis", "doctest",
    "email._header_value_parser", "email._policybase", "email.charset", "email.contentmanager",
    "email.feedparser", "email.generator", "email.header", "email.headerregistry",
    "email.message", "email.policy", "email.utils", "enum", "fileinput", "fractions", "ftplib",
    "functools", "gettext", "glob", "graphlib", "gzip", "hashlib", "heapq", "hmac",
    "html.parser", "http.client", "http.cookiejar", "http.cookies", "http.server", "imaplib",
    "importlib._bootstrap", "importlib._bootstrap_external", "importlib.abc",
    "importlib.resources.abc", "inspect", "ipaddress", "json", "json.decoder", "json.encoder",
    "locale", "logging", "logging.config", "logging.handlers", "lzma", "mailbox", "mimetypes",
    "multiprocessing.managers", "multiprocessing.pool", "multiprocessing.shared_memory",
    "netrc", "numbers", "optparse", "os", "pathlib", "pdb", "pickle", "pickletools", "pkgutil",
    "platform", "plistlib", "poplib", "pprint", "profile", "pstats", "py_compile", "pyclbr",
    "pydoc", "queue", "random", "re", "sched", "secrets", "selectors", "shelve", "shlex",
    "shutil", "site", "smtplib", "socket", "socketserver", "ssl", "statistics", "string",
    "subprocess", "sysconfig", "tarfile", "tempfile", "textwrap", "_threading_local",
    "threading", "timeit", "tkinter", "tkinter.dnd", "tkinter.ttk", "token", "tokenize",
    "trace", "traceback", "tracemalloc", "turtle", "types", "typing", "unittest.case",
    "unittest.loader", "unittest.main", "unittest.mock", "urllib.parse", "urllib.request",
    "urllib.robotparser", "uuid", "venv", "warnings", "wave", "weakref", "webbrowser",
    "wsgiref.simple_server", "wsgiref.validate", "xml.dom.minidom", "xml.dom.pulldom",
    "xml.etree.ElementTree", "xml.sax.handler", "xml.sax.xmlreader", "xmlrpc.client",
    "xmlrpc.server", "zipapp", "zipfile",
)
# fmt: on

_BLANK = re.compile(r"\n\s*\n")
_HEADING = re.compile(r"^(\S.*)\n([*=~^-])\2{3,}$", re.MULTILINE)
_BULLET = re.compile(r"(?:[*•+-]|\(?\d+[.)]|#\.) +")
_NOT_PROSE = re.compile(r">>>|::=|\+--|\|--|\||==|--+ *$|\b\w+\(\) ->")
_MARKUP = (
    (re.compile(r"(?::[\w+-]+)+:`[~!]?([^`<]*?)(?: *<[^>`]*>)?`"), r"\1"),  # :role:`text <target>`
    (re.compile(r"``(.+?)``"), r"\1"),
    (re.compile(r"`([^`<]+?)(?: *<[^>`]*>)?`_{0,2}"), r"\1"),
    (re.compile(r"(?<![\w*])(\*{1,2})(?=[^\s*])(.+?)(?<=[^\s*])\1(?![\w*])"), r"\2"),
    (re.compile(r" ?\[\d+\]_?"), ""),  # footnotes
    (re.compile(r"\\([*_`|\\])"), r"\1"),
    (re.compile(r"::$"), ":"),
)


def demo_documents() -> tuple[list[str], list[str]]:
    """Calibration and held-out documents: every tenth one is held out.

    Raises:
        ShearlingError: this Python comes without its documentation and its sources.
    """
    seen: set[str] = set()
    documents = []
    for raw in (*_topics(), *_docstrings()):
        paragraphs = [text for text in dict.fromkeys(_paragraphs(raw)) if text not in seen]
        seen.update(paragraphs)
        document = "\n\n".join(paragraphs)
        if len(document) >= SHORTEST_DOCUMENT:
            documents.append(document)
    if len(documents) < HELD_OUT_EVERY:
        raise ShearlingError(
            f"the demo reads its text from the documentation and sources of Python's standard "
            f"library, but only {len(documents)} documents were found under "
            f"{sysconfig.get_path('stdlib')}; run it with a Python that has its sources."
        )
    held_out = documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    del documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return documents, held_out


def write_demo_text(directory: Path) -> tuple[Path, Path]:
    """Write ``calibration.jsonl`` and ``held-out.jsonl``, one ``{"text": …}`` a line.

    Returns:
        Their paths, in this order.
    """
    calibration, held_out = demo_documents()
    return (
        _write_lines(directory / "calibration.jsonl", calibration),
        _write_lines(directory / "held-out.jsonl", held_out),
    )


def _write_lines(path: Path, documents: list[str]) -> Path:
    from shearling.files.writer import (
        write_text,  # brings torch, which reading the text does not need
    )

    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    write_text(path, "".join(lines))
    return path


def _topics() -> Iterator[str]:
    """Sections of the language reference; none where Python comes without it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name in sorted(topics):
        text = topics[name]
        starts = [0, *(match.start() for match in _HEADING.finditer(text)), len(text)]
        for start, end in pairwise(starts):
            yield text[start:end]


def _docstrings() -> Iterator[str]:
    """Long docstrings of ``MODULES`` in the order of the sources."""
    root = Path(sysconfig.get_path("stdlib"))
    for module in MODULES:
        path = root.joinpath(*module.split("."))
        source = path / "__init__.py" if path.is_dir() else path.with_name(path.name + ".py")
        try:
            tree = ast.parse(source.read_bytes())
        except (OSError, SyntaxError):
            continue
        nodes = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
            docstring = ast.get_docstring(node) or ""
            if len(docstring) >= LONG_DOCSTRING:
                yield docstring


def _paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of prose on one line each, without markup."""
    text = _HEADING.sub("", text)
    for block in _BLANK.split(text.expandtabs()):
        for lines in _runs(block):
            paragraph = _join(lines)
            for pattern, replacement in _MARKUP:
                paragraph = pattern.sub(replacement, paragraph)
            if _is_prose(paragraph):
                yield paragraph


def _runs(block: str) -> Iterator[list[str]]:
    """Lines that belong together: a new run starts at a list item or another indentation."""
    run: list[str] = []
    margin = None
    for line in filter(str.strip, block.splitlines()):
        text = line.lstrip()
        indent = len(line) - len(text)
        bullet = _BULLET.match(text)
        if run and (bullet or indent != margin):
            yield run
            run = []
        margin = indent + (bullet.end() if bullet else 0)
        run.append(text[bullet.end() :] if bullet else text)
    if run:
        yield run


def _join(lines: list[str]) -> str:
    """One line, with words that were broken at their hyphen made whole."""
    joined = re.sub(r"(?<=[a-z])-\n(?=[a-z])", "-", "\n".join(line.strip() for line in lines))
    return " ".join(joined.split())


def _is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as English sentences rather than code, a table or a signature."""
    plain = sum(c.isalpha() or c in " ,.'" for c in paragraph)
    return (
        len(paragraph) >= 60
        and len(paragraph.split()) >= 10
        and (paragraph[0].isupper() or paragraph[0] in "\"'“(")
        and paragraph[-1] in ".:!?)\"'”"
        and plain >= 0.88 * len(paragraph)
        and not _NOT_PROSE.search(paragraph)
    )
