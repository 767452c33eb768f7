"""What rounding costs and saves: torchao's int8 and int4, and GGUF types, on the same text.

    SHEARLING_BENCH_DATA=DIR LLAMA_CPP=DIR python benchmarks/quantizing.py [--scratch DIR]

SmolLM2-135M, its weights in bfloat16, on the first windows of DIR/wikitext2-test.txt; a GGUF file
is measured as transformers reads it. Types that need llama-quantize are left out where it is not
found, and all of GGUF where there is no converter. Writes results/quantizing.json.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from common import save, source_directory, text_file
from shearling.errors import ShearlingError
from shearling.evaluate.perplexity import Windows, evaluate
from shearling.files.terminal import progress_bars
from shearling.model.checkpoint import Checkpoint
from shearling.model.resolve import resolve
from shearling.ship.gguf import check, export
from shearling.ship.quantize import plan, quantize

WINDOW, WINDOWS = 512, 12
TORCHAO: tuple[tuple[str, int | None], ...] = (
    ("int8", None),
    ("int8", 64),
    ("int4", 32),
    ("int4", 64),
)
GGUF = ("f16", "q8_0", "q4_k_m", "q4_0")


def main() -> None:
    """Make and measure them all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--scratch", type=Path, help="where to keep what is made")
    arguments = parser.parse_args()
    text = text_file("wikitext2-test.txt", Path("README.md"))
    with tempfile.TemporaryDirectory() as temporary, progress_bars() as progress:
        scratch = arguments.scratch or Path(temporary)
        os.environ.setdefault("SHEARLING_CACHE", str(scratch / "cache"))
        source = _sixteen_bits(Checkpoint.open(source_directory()), scratch / "bfloat16")
        rows = [_row("source", "bfloat16", source.path, source.bytes, text)]
        for to, group in TORCHAO:
            output = scratch / f"{to}-{group}"
            wanted = plan(source, to, group=group)
            manifest = quantize(source, output, wanted, progress=progress)
            made = _row("torchao", f"{to}, {group or 'a row'}", output, wanted.bytes, text)
            rows.append(made | {"divergence": manifest["proof"]["divergence"]})
        for kind in GGUF:
            file = scratch / f"{kind}.gguf"
            try:
                check(source, file, kind)
            except ShearlingError as error:
                print(f"{kind} left out: {error}")
                continue
            export(source, file, outtype=kind, progress=progress)
            rows.append(_row("gguf", kind, resolve(file), file.stat().st_size, text))
    save("quantizing", {"text": text.name, "window": WINDOW, "windows": WINDOWS, "rows": rows})
    for row in rows:  # the table of docs/quantizing.md
        print(
            f"| {row['how']} | {row['type']} | {row['bytes'] / 1e6:.1f} | {row['perplexity']:.2f} |"
        )


def _sixteen_bits(source: Checkpoint, output: Path) -> Checkpoint:
    """The source in bfloat16, as models are published; the demo's comes out of a GGUF file."""
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.bfloat16)
    model.save_pretrained(output)
    source.tokenizer().save_pretrained(output)
    return Checkpoint.open(output)


def _row(how: str, kind: str, path: Path, size: int, text: Path) -> dict[str, Any]:
    found = evaluate(path, text, Windows(tokens=WINDOW, most=WINDOWS))
    return {"how": how, "type": kind, "bytes": size, "perplexity": round(found["perplexity"], 3)}


if __name__ == "__main__":
    main()
