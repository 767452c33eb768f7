"""Three sizes of SmolLM2-135M at once against one after the other: time, memory, and the bytes.

Each is a command of its own, in a process of its own, on windows of 256 tokens from the first nine
tenths of c4.jsonl, everything else by default: 0.9x, 0.8x and 0.7x alone, and all three together.
Asked for: together at most 1.5 times the time of the one that takes longest alone, and at most 1.3
times the memory; the same weights, byte for byte.

    SHEARLING_BENCH_DATA=DIR python benchmarks/sizes.py [WINDOWS] [--largest]

writes results/sizes.json; with --largest only 0.9x is run alone, and compared. WINDOWS is 64.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import first_nine_tenths, measured, save, source_directory, text_file
from shearling.commands.demo_text import write_demo_text
from shearling.files.writer import file_digest

SIZES = ("0.9x", "0.8x", "0.7x")
LENGTH = 256


def weights(directory: Path) -> dict[str, str]:
    """File -> digest."""
    return {file.name: file_digest(file) for file in sorted(directory.glob("*.safetensors"))}


def stages(directory: Path) -> dict[str, Any]:
    """What a size's manifest says of the time that its stages took."""
    manifest = json.loads((directory / "shearling.json").read_text())
    options = manifest["options"]
    return {
        "choosing": options["seconds_choosing"], "repair": options["repair"]["seconds"],
        "writing": manifest["seconds"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("windows", type=int, nargs="?", default=64)
    parser.add_argument("--largest", action="store_true")
    asked = parser.parse_args()
    source = source_directory()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        whole = text_file("redpajama/c4.jsonl", write_demo_text(scratch)[0])
        text = first_nine_tenths(whole, scratch)

        def prune(params: str, output: Path) -> dict[str, float]:
            return measured(
                ["prune", str(source), "--params", params, "--calibration", str(text),
                 "--samples", str(asked.windows), "--length", str(LENGTH),
                 "--output", str(output)]
            )  # fmt: skip

        alone: dict[str, dict[str, Any]] = {}
        for size in SIZES[:1] if asked.largest else SIZES:
            alone[size] = prune(size, scratch / "alone" / size)
            alone[size]["stages"] = stages(scratch / "alone" / size)
        together: dict[str, Any] = prune(",".join(SIZES), scratch / "together")
        together["stages"] = {size: stages(scratch / "together" / size) for size in SIZES}
        same = {
            size: weights(scratch / "alone" / size) == weights(scratch / "together" / size)
            for size in alone
        }
    ratios = {
        figure: round(together[figure] / max(one[figure] for one in alone.values()), 3)
        for figure in together
        if figure != "stages"
    }
    save("sizes", {
        "windows": asked.windows, "length": LENGTH, "alone": alone, "together": together,
        "ratios": ratios, "same_bytes": same,
    })  # fmt: skip


if __name__ == "__main__":
    main()
