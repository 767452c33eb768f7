"""The list of commands: what it says is what they say, and it waits for none of them."""

from __future__ import annotations

import inspect
import pkgutil
import subprocess
import sys
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from shearling import commands
from shearling.cli import app
from shearling.commands.listed import SUMMARIES

# Files beside the commands that are none.
OTHERS = {
    "asked_wrong", "demo_run", "demo_text", "eval_plan", "listed", "options", "prune_lines",
    "size_options", "takes", "target_options",
}  # fmt: skip


@pytest.mark.parametrize("name", SUMMARIES)
def test_a_summary_says_what_the_docstring_says(name: str) -> None:
    group: Any = typer.main.get_command(app)
    assert inspect.cleandoc(group.commands[name].help).split()[0] == SUMMARIES[name].split()[0]


@pytest.mark.parametrize("name", SUMMARIES)
def test_a_summary_is_a_whole_sentence_on_one_line_of_80_columns(name: str) -> None:
    shown = CliRunner().invoke(app, ["--help"], terminal_width=80).output.splitlines()
    (line,) = (line for line in shown if line.startswith(f"  {name} "))
    assert line.removeprefix(f"  {name} ").strip() == SUMMARIES[name]
    assert line.endswith(".")
    assert "..." not in line
    assert len(line) <= 80


def test_every_command_is_listed() -> None:
    files = {module.name for module in pkgutil.iter_modules(commands.__path__)}
    assert set(SUMMARIES) == files - OTHERS


def test_help_imports_no_command() -> None:
    code = (
        "import sys; sys.argv = ['shearling', '--help']\n"
        "from shearling.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in sys.modules if m.startswith('shearling.commands.')], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "['shearling.commands.listed']"
    for name, summary in SUMMARIES.items():
        assert f"  {name} " in done.stdout
        assert summary in done.stdout
