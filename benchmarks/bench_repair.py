"""How the time of `shearling prune` goes with the tokens it is given, stage by stage.

SmolLM2-135M to 28 blocks of 1,243 neurons, everything by default, on 16, 32 and 64 windows of 256
tokens from the first nine tenths of c4.jsonl. The text that the model makes itself grows with them,
and so should every stage but the last: the cut is written and proven alike.

    SHEARLING_BENCH_DATA=DIR python benchmarks/bench_repair.py

writes results/repair.json: seconds of each stage, and of a token of real text.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from common import first_nine_tenths, save, source_directory, text_file
from shearling.commands.demo_text import write_demo_text
from shearling.data.sources import TextSource
from shearling.engine.place import Place
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.plan import parse_shape
from shearling.pruning.run import Run, Wanted
from shearling.repair.calibration import Calibration

SHAPE = "layers=28,mlp=1243"
WINDOWS, LENGTH = (16, 32, 64), 256


def stages(source: Checkpoint, text: Path, windows: int, output: Path) -> dict[str, float]:
    """Seconds of each stage, by the name it has in the progress, and of all."""
    begun = time.perf_counter()
    ends: dict[str, float] = {}

    def mark(stage: str, done: float, total: float, /) -> None:
        ends[stage] = time.perf_counter()

    calibration = Calibration((TextSource(text),), windows, LENGTH)
    run = Run(source, calibration, place=Place.cpu(), progress=mark)
    run.write(run.choose(Wanted(parse_shape(SHAPE, source))), output)
    seconds, last = {}, begun
    for stage, end in ends.items():
        seconds[stage], last = round(end - last, 1), end
    return seconds | {"all": round(time.perf_counter() - begun, 1)}


def main() -> None:
    source = Checkpoint.open(source_directory())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        whole = text_file("redpajama/c4.jsonl", write_demo_text(scratch)[0])
        text = first_nine_tenths(whole, scratch)
        for windows in WINDOWS:
            seconds = stages(source, text, windows, scratch / f"{windows}")
            each = 1000 * seconds["all"] / (windows * LENGTH)
            rows.append(
                {"windows": windows, "tokens": windows * LENGTH, "seconds": seconds,
                 "milliseconds_per_token": round(each, 2)}
            )  # fmt: skip
    save("repair", {"shape": SHAPE, "rows": rows})


if __name__ == "__main__":
    main()
