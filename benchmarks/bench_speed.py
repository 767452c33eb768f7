"""What a depth-pruned model gains of what its operations promise, and a model against itself.

    python benchmarks/bench_speed.py [--engines transformers,llama.cpp] [--llama-cpp DIR]
        [--vllm PROGRAM] [--repeats 15] [--dtype float32]

SmolLM2-135M with 20 of its 30 blocks (any will do: speed does not depend on which) is timed beside
the whole model, and the whole model beside itself, at batch 1, with 128 tokens of prompt and 64
after it. All three take turns, so that both ratios come from the same minutes. The promise counts
the operations of a decode step with its LM head. Needs nothing beside the machine to itself:
llama.cpp's threads wait for each other in a loop, and stand still where a core is taken away.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, save, source_directory

BLOCKS = 20
BATCH, PROMPT, NEW = 1, 128, 64
SELF_LIMIT, PROMISE_LIMIT = 0.03, 0.9  # the figures to reach


def main() -> None:
    """Measure with each engine, and write both figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--engines", default="transformers,llama.cpp", help="separated by commas")
    parser.add_argument("--llama-cpp", type=Path, help="a directory with llama.cpp's programs")
    parser.add_argument("--vllm", type=Path, help="the program vllm of its environment")
    parser.add_argument("--repeats", type=int, default=15, help="rounds")
    parser.add_argument("--dtype", default="float32", help="what to compute in")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = _timed(arguments, _cut(Path(scratch)))
    rows = [_row(engine, result) for engine in arguments.engines.split(",")]
    before = _before(arguments.engines.split(","))
    save(
        "speed",
        {
            "blocks": BLOCKS, "batch": BATCH, "prompt": PROMPT, "new": NEW,
            "dtype": arguments.dtype,
            "rows": before["rows"] + [row | {"repeats": arguments.repeats} for row in rows],
            "runs": before["runs"] + result["runs"],
            "ratios": before["ratios"] + result["ratios"],
        },
    )  # fmt: skip
    for row in rows:
        print(
            f"{row['engine']}: itself {row['self_ratio']['median']:.3f}, "
            f"{BLOCKS} blocks {row['decode_speedup']['median']:.3f}x of "
            f"{row['promised_decode_speedup']:.3f}x promised: {row['share_of_promise']:.3f} "
            f"({'reached' if row['reached'] else 'NOT reached'})"
        )


def _before(engines: list[str]) -> dict[str, list[dict[str, Any]]]:
    """What was measured with other engines, which a run with some of them leaves as it is."""
    file = RESULTS / "speed.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    return {
        key: [entry for entry in known.get(key, []) if entry["engine"] not in engines]
        for key in ("rows", "runs", "ratios")
    }


def _cut(scratch: Path) -> Path:
    """The first 20 blocks of the model."""
    from shearling.model.checkpoint import Checkpoint
    from shearling.pruning.cut import cut
    from shearling.table.values import Keep

    source = Checkpoint.open(source_directory())
    pruned = scratch / f"{source.name}-{BLOCKS}-blocks"
    cut(source, Keep({"layers": tuple(range(BLOCKS))}, {}), pruned)
    return pruned


def _timed(arguments: argparse.Namespace, pruned: Path) -> dict[str, Any]:
    from shearling.evaluate.engines import Places
    from shearling.evaluate.speed import Workload, bench
    from shearling.files.terminal import progress_bars

    source = source_directory()
    with progress_bars() as progress:
        workload = Workload(
            engines=arguments.engines.split(","),
            places=Places(arguments.llama_cpp, arguments.vllm), batches=(BATCH,),
            prompts=(PROMPT,), news=(NEW,), repeats=arguments.repeats, dtype=arguments.dtype,
        )  # fmt: skip
        return bench([source, source, pruned], workload, progress=progress)


def _row(engine: str, result: dict[str, Any]) -> dict[str, Any]:
    """Both figures of one engine."""
    itself, pruned = [found for found in result["ratios"] if found["engine"] == engine]
    off = abs(itself["decode_speedup"]["median"] - 1)
    run = next(run for run in result["runs"] if run["engine"] == engine)
    return {
        "engine": engine,
        "engine_version": run["engine_version"],
        "self_ratio": itself["decode_speedup"],
        "self_ratio_prefill": itself["prefill_speedup"],
        **{
            name: pruned[name]
            for name in (
                "decode_speedup", "prefill_speedup", "promised_decode_speedup",
                "share_of_promise", "parameters_removed", "block_parameters_removed",
            )
        },
        "reached": off <= SELF_LIMIT and pruned["share_of_promise"] >= PROMISE_LIMIT,
    }  # fmt: skip


if __name__ == "__main__":
    main()
