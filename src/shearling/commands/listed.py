"""The commands by name. A command's module is imported when it is called, not when it is listed.

Importing all of them took longer than the rest of ``shearling --help``. So a line of each, which
says what its docstring's first sentence says in more words, is here.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

# What each does, in the order of the help; at 80 columns there is room for 63 characters.
SUMMARIES = {
    "init": "Write a recipe from four answers.",
    "run": "Make a smaller model by a recipe, stage by stage.",
    "inspect": "Show a model's shape, exact counts, costs and lineage.",
    "score": "Score every block of a model, or every unit of a width.",
    "prune": "Cut a model to a shape or a size, repair it, and prove it.",
    "write": "Have a model write text to calibrate or train with.",
    "pack": "Turn text into a store of tokens to heal a model with.",
    "learn": "Learn in training which units to keep, and cut to them.",
    "heal": "Retrain a model on text or from its source.",
    "teach": "Keep a teacher's likeliest next tokens on disk.",
    "reference": "Find the loss that each domain should come down to.",
    "eval": "Measure perplexity, tasks, abilities and repetition.",
    "bench": "Time prefill and decode, and measure memory.",
    "judge": "Let a judge say which of two models answers better.",
    "compare": "Make one page that says which of several models to ship.",
    "studio": "Open a local page where models answer side by side.",
    "quantize": "Round a model's matrices to eight or four bits.",
    "export": "Write a model as a GGUF file with llama.cpp's converter.",
    "report": "Make one HTML page of everything that was measured.",
    "demo": "Make a real model smaller, measure it, and write a report.",
}
_FUNCTIONS = {"eval": "evaluate"}  # those that are not called as their command is


class _Commands(MutableMapping[str, Any]):
    """Commands by name, each made when it is asked for."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name in SUMMARIES and name not in self._made:
            module = import_module(f"shearling.commands.{name}")
            alone = typer.Typer(
                add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
            )
            alone.command(name)(getattr(module, _FUNCTIONS.get(name, name)))
            self._made[name] = typer.main.get_command(alone)
        return self._made[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._made[name] = command

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"command {name!r} cannot be taken away")

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*SUMMARIES, *self._made]))

    def __len__(self) -> int:
        return len(list(iter(self)))


class Listed(TyperGroup):
    """A group of the commands above."""

    def __init__(self, **settings: Any) -> None:
        """As typer makes it, but for the commands."""
        super().__init__(**settings)
        self.commands = _Commands()

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List them in the help, without importing any."""
        named: dict[str, Any] = {
            name: TyperCommand(name, short_help=says) for name, says in SUMMARIES.items()
        }
        TyperGroup(name=self.name, commands=named).format_commands(ctx, formatter)
