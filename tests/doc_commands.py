"""The commands that README, docs and runs show, and those of them that can be run here."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from shearling.cli import app

ROOT = Path(__file__).parent.parent
GROUP: Any = typer.main.get_command(app)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPTS = sorted((ROOT / "runs").glob("*.sh"))
# What makes no other way of calling a command.
AMOUNTS = {
    "--batch", "--bench", "--length", "--max-windows", "--new", "--output", "--seed", "--window",
    "batch", "lr",
}  # fmt: skip
CODE = ("", "sh", "bash", "console")  # languages of fenced blocks in which commands stand


@dataclass(frozen=True)
class Shown:
    """A command as a page shows it.

    Attributes:
        page: where, from the root.
        name: of the command.
        arguments: as a shell would hand them on.
    """

    page: str
    name: str
    arguments: tuple[str, ...]

    def parsed(self, *more: str) -> dict[str, Any]:
        """What the command line makes of the arguments, and of ``more`` behind them."""
        command = GROUP.commands[self.name]
        return command.make_context(self.name, [*self.arguments, *more]).params

    @property
    def way(self) -> tuple[str, ...]:
        """What tells it from commands that do the same to other things, or more or less of it."""
        options = {one for one in self.arguments if one.startswith("-")}
        settings = {one.split("=")[0] for one in self.arguments if re.match(r"[a-z_.]+=", one)}
        kinds = {f"{one} {value}" for one, value in self.pairs() if one in ("--suite", "--recipe")}
        if self.arguments.count("--shape") > 1 or "," in dict(self.pairs()).get("--params", ""):
            kinds.add("several sizes")
        amounts = AMOUNTS | ({"--prompt"} if self.name == "bench" else set())
        return self.name, *sorted((options | settings | kinds) - amounts)

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Each argument with the one behind it."""
        yield from zip(self.arguments, self.arguments[1:], strict=False)


def code_lines(text: str) -> Iterator[str]:
    """The lines of a page's fenced and indented code, those that go on joined."""
    fence: str | None = None
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            fence = line[3:].strip() if fence is None else None
        elif fence in CODE or (fence is None and line.startswith("    ")):
            yield line.strip()


def commands_on(page: Path) -> Iterator[Shown]:
    """Every call of shearling in a page's code, or in a script's."""
    text = page.read_text(encoding="utf-8")
    script = page.suffix == ".sh"
    lines = text.replace("\\\n", " ").splitlines() if script else code_lines(text)
    call = r"(?:^|\|\| )(?:torchrun .* -m shearling\.cli|shearling) +([a-z]+) (.*)"
    for line in lines:
        if found := re.search(call, line.strip()):
            arguments = tuple(shlex.split(found[2], comments=True))
            yield Shown(str(page.relative_to(ROOT)), found[1], arguments)


def every_command() -> list[Shown]:
    """Those of all pages and scripts."""
    return [shown for page in [*PAGES, *SCRIPTS] for shown in commands_on(page)]


def ways() -> list[Shown]:
    """One command of each way that can be run here: neither a server nor the network is needed."""
    first = {shown.way: shown for shown in reversed(every_command()) if not stays(shown)}
    return sorted(first.values(), key=lambda shown: shown.way)


# What is parsed and not run, and why.
STAYS: dict[str, Callable[[Shown], bool]] = {
    "serves until it is stopped": lambda shown: shown.name == "studio",
    "asks a judge": lambda shown: shown.name == "judge",
    "needs llama.cpp": lambda shown: shown.name == "export" or "llama.cpp" in str(shown.arguments),
    "needs vLLM": lambda shown: "--vllm" in shown.arguments,
    "times shapes on this machine": lambda shown: "--speed" in shown.arguments,
    "takes tasks of the hub": lambda shown: "--tasks" in shown.arguments,
    "rounds to groups wider than a tiny model": lambda shown: "--group" in shown.arguments,
    "reads what a whole run made": lambda shown: "--results" in shown.arguments,
}


def stays(shown: Shown) -> str | None:
    """Why a command is not run; None if it is."""
    return next((why for why, is_so in STAYS.items() if is_so(shown)), None)
