"""What each command is given to open a model, for what must hold in every one of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shearling import cli
from tiny_tokenizer import write_llama

TRAIN = ("--tokens", "200", "batch=2", "eval_sequences=1")
# What each command is given; {model} is what has the code, {out} a new path.
COMMANDS: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", "{model}"),
    "score": ("score", "{model}", "--calibration", "{text}", "--samples", "2", "--length", "16"),
    "prune": ("prune", "{model}", "--layers", "2", "--by", "influence", "--calibration", "{text}",
              "--samples", "2", "--length", "16", "--output", "{out}"),
    "eval": ("eval", "{model}", "--text", "{text}", "--window", "16", "--max-windows", "2"),
    "compare": ("compare", "{model}", "{plain}", "--text", "{text}", "--window", "16",
                "--max-windows", "2", "--output", "{out}.html", "--no-bench"),
    "quantize": ("quantize", "{model}", "--to", "int8", "--output", "{out}"),
    "export": ("export", "{model}", "--output", "{out}.gguf"),
    "judge": ("judge", "{model}", "{plain}", "--prompts", "{prompts}", "--endpoint",
              "http://127.0.0.1:9", "--output", "{out}.json"),
    "studio": ("studio", "{model}"),
    "heal": ("heal", "{model}", "--data", "{store}", "--output", "{out}", *TRAIN),
    "learn": ("learn", "{model}", "--shape", "layers=6", "--data", "{store}", "--output", "{out}",
              "--recipe", "warm", "samples=4", "sample_length=16", *TRAIN),
    "teach": ("teach", "{model}", "--data", "{store}", "--output", "{out}", "--top", "4"),
    "reference": ("reference", "{model}", "--store", "{store}", "--output", "{out}.json"),
    "write": ("write", "{model}", "--tokens", "40", "--length", "20", "--output", "{out}.jsonl"),
    "pack": ("pack", "{text}", "--tokenizer", "{model}", "--output", "{out}", "--length", "24",
             "--workers", "1"),
    "demo": ("demo", "--model", "{model}", "--text", "{text}", "--output", "{out}"),
    "init": ("init", "--model", "{model}", "--text", "{text}", "--size", "2 blocks", "--machine",
             "cpu", "--output", "{out}.yaml"),
    "run": ("run", "laptop", "--source", "{model}", "--text", "{text}", "--output", "{out}",
            "--dry-run"),
    "bench": ("bench", "{model}", "--prompt", "4", "--new", "2", "--repeats", "1", "--batch", "1"),
}  # fmt: skip


class Inputs:
    """A plain model, and text, prompts and a token store that its tokenizer has made."""

    def __init__(self, root: Path, *, layers: int = 8, **options: Any) -> None:
        """Write them into ``root``; ``options`` are of the model."""
        self.root, self.plain = root, write_llama(root / "plain", layers=layers, **options)
        lines = [json.dumps({"text": f"{n} sheep on the hill. " * (n % 5 + 9)}) for n in range(40)]
        self.text = root / "text.jsonl"
        self.text.write_text("\n".join(lines))
        self.prompts = root / "prompts.txt"
        self.prompts.write_text("sheep\n")
        self.store = root / "store"
        run("pack", self.text, "--tokenizer", self.plain, "--output", self.store, "--length", 24,
            "--held-out", 0.2, "--workers", 1)  # fmt: skip

    def arguments(self, name: str, model: Path, place: Path) -> list[str]:
        """A command's, with ``model`` for what it opens, and outputs in ``place``."""
        values = {
            "model": model, "text": self.text, "plain": self.plain, "out": place / "out",
            "store": self.store, "prompts": self.prompts,
        }  # fmt: skip
        return [argument.format(**values) for argument in COMMANDS[name]]


def run(*arguments: object) -> None:
    """Call the command line in this process; its errors are raised."""
    cli.app([str(argument) for argument in arguments], standalone_mode=False)
