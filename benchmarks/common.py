"""What the benchmarks share: the machine, where results go, measuring a command's memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from shearling.commands.demo_run import demo_model
from shearling.evaluate.speed import machine
from shearling.files.writer import write_json
from shearling.model.manifest import stamp, versions
from shearling.model.resolve import resolve

RESULTS = Path(__file__).parent / "results"


def source_directory() -> Path:
    """SmolLM2-135M, from the package the demo uses, or ``SHEARLING_BENCH_MODEL``."""
    return resolve(os.environ.get("SHEARLING_BENCH_MODEL") or demo_model())


def text_file(name: str, fallback: Path) -> Path:
    """A text of ``SHEARLING_BENCH_DATA``, a directory of samples of public data, or a fallback."""
    data = os.environ.get("SHEARLING_BENCH_DATA")
    return Path(data) / name if data else fallback


def first_nine_tenths(text: Path, directory: Path) -> Path:
    """The documents of a .jsonl that calibration may see; evaluation has the last tenth."""
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    file = directory / f"{text.stem}-first-nine-tenths.jsonl"
    file.write_text("".join(lines[: len(lines) * 9 // 10]), encoding="utf-8")
    return file


def held_out_windows(tokenizer: Any, windows: int = 12, length: int = 512) -> dict[str, Any]:
    """Windows of c4's last tenth (documents joined with EOS), and of WikiText-2."""
    import torch

    ids: list[int] = []
    for line in text_file("redpajama/c4.jsonl", Path()).open(encoding="utf-8"):
        ids += tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
        ids.append(tokenizer.eos_token_id)
    c4 = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    text = text_file("wikitext2-test.txt", Path()).read_text(encoding="utf-8")[:100_000]
    wiki = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    return {
        "c4": c4[-(len(c4) // 10) :][:windows],
        "wikitext2": wiki[: windows * length].view(windows, length),
    }


def save(name: str, result: dict[str, Any], *, shown: bool = True) -> None:
    """Write a result with the machine it was taken on, and show it."""
    result = stamp() | {"machine": machine(), "versions": versions()} | result
    write_json(RESULTS / f"{name}.json", result)
    if shown:
        print(json.dumps(result, indent=2))


def measured(arguments: list[str]) -> dict[str, float]:
    """Run shearling in a process of its own: seconds and peak resident memory (MiB); Linux."""
    # VmHWM is of this process alone; getrusage's figure would be inherited from this one of ours.
    script = (
        "import sys, re; from shearling.cli import app\n"
        "try: app(sys.argv[1:], standalone_mode=False)\n"
        "finally:\n"
        "    status = open('/proc/self/status').read()\n"
        "    print('PEAK', re.search(r'VmHWM:\\s*(\\d+)', status)[1])"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    peak = int(done.stdout.rsplit("PEAK", 1)[1])  # KiB
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "peak_mib": round(peak / 1024, 1),
    }


__all__ = ["first_nine_tenths", "measured", "save", "source_directory", "text_file"]
