"""`shearling bench` as a result file of docs/files.md, and as a table for a person."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shearling.evaluate.ratios import sentence
from shearling.evaluate.speed import Workload, bench
from shearling.files.progress import Progress, silent
from shearling.files.sizes import in_bytes
from shearling.model.subject import OpenedModel


def bench_models(
    models: Sequence[str | Path | OpenedModel],
    workload: Workload | None = None,
    *,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Speed and memory, in turns; as :func:`shearling.evaluate.speed.bench`."""
    return bench(models, workload, progress=progress)


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """What a bench would time, for a person; ``plan`` as ``evaluate.speed.BenchPlan`` says it."""
    names = ", ".join(f"{one['name']} ({one['parameters']:,} parameters)" for one in plan["models"])
    runs = len(plan["grid"]) * (1 + plan["repeats"]) * len(plan["models"])
    return [
        f"models: {names}",
        *(
            f"with {one['engine']} {one['engine_version']}: {runs} runs, at least "
            f"{in_bytes(one['bytes'])} of memory"
            for one in plan["engines"]
        ),
        *(
            f"batch {cell['batch']}: {cell['prompt']} prompt tokens, {cell['new']} new ones; "
            f"a warm-up and {plan['repeats']} rounds"
            for cell in plan["grid"]
        ),
        *([f"at most, as {plan['budget']:g} s are given for all of it"] if plan["budget"] else []),
        f"in {plan['dtype']} on {plan['device']}",
    ]


def bench_lines(result: dict[str, Any]) -> list[str]:
    """A table of a bench for a person: medians, then least and most; ratios below."""
    head = (
        f"{'model':24} {'engine':12} {'batch':>5} {'prompt':>6} {'new':>5} {'first token ms':>22} "
        f"{'ms/token':>21} {'decode tok/s':>22} {'peak MiB':>9}"
    )
    rows = [
        f"{run['model']['name'][:24]:24} {run['engine']:12} {run['batch']:5d} {run['prompt']:6d} "
        f"{run['new']:5d} {_spread(run['first_token_ms']):>22} {_spread(run['ms_per_token']):>21} "
        f"{_spread(run['decode_tokens_per_s']):>22} {_mebibytes(run['peak_memory_bytes']):>9}"
        for run in result["runs"]
    ]
    ratios = [sentence(ratio) for ratio in result["ratios"]]
    where = result["machine"]
    on = [f"in {where['dtype']} on {where['device']}"] if where["device"] != "cpu" else []
    return [head, *rows, *on, *([""] if ratios else []), *ratios, *result.get("budget_notes", ())]


def _spread(figures: dict[str, float]) -> str:
    return f"{figures['median']:.1f} ({figures['min']:.1f}-{figures['max']:.1f})"


def _mebibytes(peak: int | None) -> str:
    return "" if peak is None else f"{peak / 2**20:,.0f}"
