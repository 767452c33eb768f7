"""Depth against width, every criterion, with and without repair, at equal parameter counts.

    SHEARLING_BENCH_DATA=DIR python benchmarks/one_shot.py [--only NAME,...] [--speed]

SmolLM2-135M loses 20 % and 40 % of the parameters in its blocks: by whole blocks (24 and 18 of 30
stay), by MLP neurons (1,126 and 716 of 1,536), or by both, as `--params` would. Calibration is 64
windows of 256 tokens from the first nine tenths of c4.jsonl; evaluation the first 12 windows of 512
tokens of its last tenth, and of WikiText-2. Every criterion is a process of its own, scores once
for all its rows, and writes each row down as it ends, so that the run can be stopped and taken up
again. ``--speed`` times the shapes instead, in turns. Needs DIR, which holds redpajama/c4.jsonl and
wikitext2-test.txt.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import RESULTS, first_nine_tenths, held_out_windows, save, source_directory, text_file

DEPTH = ("repair", "perplexity", "taylor+", "taylor", "magnitude+", "influence", "greedy")
WIDTH = (
    "fisher-energy", "fisher", "energy", "obs", "flap", "wanda-sp", "activation", "taylor",
    "taylor-element", "magnitude-l2", "random",
)  # fmt: skip
SHAPES = {
    ("depth", 20): "layers=24", ("depth", 40): "layers=18",
    ("width", 20): "mlp=1126", ("width", 40): "mlp=716",
}  # fmt: skip
PARAMS = {20: "113274432", 40: "92033856"}  # what the depths above leave
DEFAULTS = (("both", "default"), ("width", "fisher-energy"), ("depth", "repair"))
REPAIRS = ("none", "refit", "refit+text")  # the last for the defaults alone
COMPARISON: dict[str, Any] = {  # what the rows are, for `shearling report` (docs/files.md)
    "kind": "comparison",
    "title": "Depth, width and repair, without training",
    "note": "64 windows of 256 tokens of calibration, 12 of 512 of evaluation.",
    "panel": ["removed", "axis"],
    "panel_name": "{axis}, −{removed} % of the blocks’ parameters",
    "label": "criterion",
    "series": "repair",
    "order": list(REPAIRS),
    "baseline": "dense",
    "measures": {"c4": "perplexity on c4", "wikitext2": "perplexity on WikiText-2"},
    "columns": {
        "parameters": "parameters", "seconds_choosing": "choosing, s",
        "seconds_repairing": "repairing, s", "peak_mib": "peak, MiB",
    },
}  # fmt: skip


def main() -> None:
    """Run what has not been run, then write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", help="criteria to run, separated by commas")
    parser.add_argument("--sizes", default="20,40", help="percentages to remove")
    parser.add_argument("--repairs", default=",".join(REPAIRS), help="which of these")
    parser.add_argument("--speed", action="store_true", help="time the shapes")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        for row in rows(*json.loads(arguments.job)):
            print("ROW " + json.dumps(row), flush=True)
        return
    if arguments.speed:
        measured = speed()
        save("one_shot", _known() | {"speed": measured})
        return
    for axis, criterion in _jobs(arguments.only):
        known = [r for r in _known()["rows"] if (r["axis"], r["criterion"]) == (axis, criterion)]
        done = [[row["removed"], row["repair"]] for row in known]
        sizes = [int(size) for size in arguments.sizes.split(",")]
        wanted = [[size, repair] for size in sizes for repair in arguments.repairs.split(",")]
        wanted = [[0, "none"]] if axis == "dense" else wanted
        left = [each for each in wanted if each not in done]
        for row in _in_a_process(axis, criterion, left) if left else ():
            result = _known()  # read again: another criterion may run beside this one
            save("one_shot", result | {"rows": [*result["rows"], row]})


def _known() -> dict[str, Any]:
    """What has been measured."""
    file = RESULTS / "one_shot.json"
    result = json.loads(file.read_text()) if file.exists() else {"rows": []}
    return COMPARISON | {k: result[k] for k in ("rows", "speed") if k in result}


def _jobs(only: str | None) -> list[tuple[str, str]]:
    jobs = [("dense", "dense"), *DEFAULTS]
    jobs += [(axis, by) for axis, all_ in (("width", WIDTH), ("depth", DEPTH)) for by in all_]
    jobs = list(dict.fromkeys(jobs))
    return jobs if only is None else [job for job in jobs if job[1] in only.split(",")]


def _in_a_process(axis: str, criterion: str, left: list[Any]) -> Iterator[dict[str, Any]]:
    command = [sys.executable, __file__, "--job", json.dumps([axis, criterion, left])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ROW "):
                yield json.loads(line[4:])
    if process.returncode:
        raise SystemExit(f"{axis} by {criterion} failed")


def rows(axis: str, criterion: str, left: list[Any]) -> Iterator[dict[str, Any]]:
    """The rows of one criterion that are left; only repaired tensors go to disk."""
    from shearling.engine.views.cut import cut_view
    from shearling.model.checkpoint import Checkpoint

    source = Checkpoint.open(source_directory())
    repairs = REPAIRS if (axis, criterion) in DEFAULTS else REPAIRS[:2]
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        calibration = replace(_calibration(scratch), shares=(), written=0)
        choose = _chooser(source, axis, criterion, calibration)
        by_default = _by_default(source, axis)
        for removed, repair in left:
            if repair not in repairs and axis != "dense":
                continue
            row: dict[str, Any] = {
                "axis": axis, "removed": removed, "criterion": criterion, "repair": repair,
            }  # fmt: skip
            if axis == "dense":
                row["parameters"] = source.parameters
                model = _loaded(source, {})
            elif repair == "refit+text" or axis == "both":
                model = by_default(removed, repair, _calibration(scratch), row)
            else:
                keep, row["seconds_choosing"], row["peak_mib"] = choose(removed)
                view = cut_view(source, keep)
                replaced = {}
                if repair == "refit":
                    ids_NS = calibration.windows(source).ids_NS
                    replaced = _repaired(source, keep, ids_NS, len(ids_NS), scratch, row)
                row |= {"parameters": view.parameters, "kept_layers": _blocks(keep)}
                model = _loaded(view, replaced)
            yield row | _evaluated(model, source.tokenizer())


def _chooser(
    source: Any, axis: str, criterion: str, calibration: Any
) -> Callable[[int], tuple[Any, float, float]]:
    """A function of the share to remove: the choice, seconds of scoring, its peak memory.

    Scores that do not depend on how much goes are computed once.
    """
    from shearling.engine.place import Place
    from shearling.pruning.choose import keep_layers, keep_units
    from shearling.scoring.registry import find
    from shearling.scoring.score import score

    found: dict[str, Any] = {}

    def scored(removed: int, blocks: int) -> Any:
        key = str(removed) if criterion == "repair" else "any"
        if key not in found:
            _restart_peak()
            started = time.perf_counter()
            if axis == "width":
                scores = score(
                    source, criterion, axis="mlp", calibration=calibration.sources,
                    samples=calibration.samples, length=calibration.length, seed=calibration.seed,
                    place=Place.cpu(),
                )  # fmt: skip
            else:
                all_windows = calibration.samples, calibration.length
                samples, length = find(criterion, "blocks").windows or all_windows
                scores = score(
                    source, criterion, calibration=calibration.sources, samples=samples,
                    length=length, place=Place.cpu(),
                    remove=blocks if criterion == "repair" else 12,
                )  # fmt: skip
            found[key] = scores, round(time.perf_counter() - started, 1), _peak()
        return found[key]

    def choose(removed: int) -> tuple[Any, float, float]:
        sizes = dict([SHAPES[axis, removed].split("=")])
        after = source.shape.with_(**{name: int(size) for name, size in sizes.items()})
        before = source.shape
        scores, seconds, peak = scored(removed, before["layers"] - after["layers"])
        if axis == "depth":
            return keep_layers(scores, after["layers"]), seconds, peak
        every = tuple(range(before["layers"]))
        return keep_units({"mlp": scores}, source.layout, before, after, every), seconds, peak

    return choose


def _by_default(source: Any, axis: str) -> Callable[[int, str, Any, dict[str, Any]], Any]:
    """What ``shearling prune`` gives, with or without the model's own text, or unrepaired.

    What survives is chosen once for each size: the model's own text has no part in it.
    """
    from shearling.engine.place import Place
    from shearling.engine.stream import BlockStream
    from shearling.engine.views.cut import cut_view
    from shearling.pruning.plan import parse_params, parse_shape, shape_for
    from shearling.pruning.run import Run, Wanted
    from shearling.repair.calibration import repair_text

    chosen: dict[int, tuple[Any, dict[str, Any]]] = {}

    def choice_of(removed: int, calibration: Any) -> tuple[Any, dict[str, Any]]:
        if removed not in chosen:
            if axis == "both":
                after = shape_for(source, parse_params(PARAMS[removed], source.parameters))
            else:
                after = parse_shape(SHAPES[axis, removed], source)
            _restart_peak()
            started = time.perf_counter()
            run = Run(source, calibration, place=Place.cpu())
            keep = run.choose(Wanted(after)).keep
            seconds = round(time.perf_counter() - started, 1)
            row = {"seconds_choosing": seconds, "peak_mib": _peak(), "shape": str(after)}
            chosen[removed] = keep, row
        return chosen[removed]

    def model(removed: int, repair: str, calibration: Any, row: dict[str, Any]) -> Any:
        if repair != "refit+text":
            calibration = replace(calibration, shares=(), written=0)
        keep, measured = choice_of(removed, calibration)
        row |= measured
        replaced = {}
        with tempfile.TemporaryDirectory() as scratch:
            if repair != "none":
                _restart_peak()
                started = time.perf_counter()
                blocks = BlockStream(source, Place.cpu())
                ids_NS = repair_text(blocks, calibration, calibration.windows(source))
                row["seconds_writing"] = round(time.perf_counter() - started, 1)
                row["peak_mib"] = max(row["peak_mib"], _peak())
                windows = calibration.samples
                replaced = _repaired(source, keep, ids_NS, windows, Path(scratch), row)
            view = cut_view(source, keep)
            row |= {"parameters": view.parameters, "kept_layers": _blocks(keep)}
            return _loaded(view, replaced)

    return model


def _repaired(
    source: Any, keep: Any, ids_NS: Any, windows: int, scratch: Path, row: dict[str, Any]
) -> dict[str, Any]:
    from shearling.engine.place import Place
    from shearling.engine.stream import BlockStream
    from shearling.repair.refit import refit

    _restart_peak()
    blocks = BlockStream(source, Place.cpu())
    found = refit(blocks, keep, ids_NS, scratch, windows=windows)
    row["seconds_repairing"] = round(found.seconds, 1)
    row["peak_mib"] = max(row["peak_mib"], _peak())
    return {name: load() for name, load in found.replaced.items()}


def _blocks(keep: Any) -> list[int]:
    return list(keep.model.get("layers", ()))


def _evaluated(model: Any, tokenizer: Any) -> dict[str, float]:
    import torch

    with torch.inference_mode():
        return {
            name: round(_perplexity(model, windows), 2)
            for name, windows in held_out_windows(tokenizer).items()
        }


def speed() -> list[dict[str, Any]]:
    """Tokens a second of every shape at batch 1 and 8, all in turns; any units will do."""
    from shearling.evaluate.speed import Workload, bench
    from shearling.model.checkpoint import Checkpoint
    from shearling.pruning.cut import cut
    from shearling.pruning.plan import parse_params, parse_shape, shape_for
    from shearling.table.values import Keep

    source = Checkpoint.open(source_directory())
    shapes = {"dense": source.shape}
    for (axis, removed), text in SHAPES.items():
        shapes[f"{axis} {removed}"] = parse_shape(text, source)
    for removed, params in PARAMS.items():
        shapes[f"both {removed}"] = shape_for(source, parse_params(params, source.parameters))
    with tempfile.TemporaryDirectory() as scratch:
        paths = {}
        for name, after in shapes.items():
            paths[name] = Path(scratch) / name.replace(" ", "-")
            if after == source.shape:
                paths[name].symlink_to(source.path, target_is_directory=True)
                continue
            layers = tuple(range(after["layers"]))
            neurons = (tuple(range(after["mlp"])),) * after["layers"]
            blocks = {"mlp": neurons} if after["mlp"] < source.shape["mlp"] else {}
            model = {"layers": layers} if after["layers"] < source.shape["layers"] else {}
            cut(source, Keep(model, blocks), paths[name])
        runs = bench(list(paths.values()), Workload(batches=(1, 8), repeats=5))["runs"]
    names = {path.name: name for name, path in paths.items()}
    names |= {source.path.name: "dense"}
    return [
        {
            **_place(names[run["model"]["name"]]),
            "sizes": str(shapes[names[run["model"]["name"]]]), "batch": run["batch"],
            "prefill_tokens_per_s": run["prefill_tokens_per_s"],
            "decode_tokens_per_s": run["decode_tokens_per_s"],
        }
        for run in runs
    ]  # fmt: skip


def _place(name: str) -> dict[str, Any]:
    """The panel that a shape belongs to, or the baseline."""
    axis, _, removed = name.partition(" ")
    return {"axis": axis, "removed": int(removed)} if removed else {"criterion": name}


def _loaded(checkpoint: Any, replaced: dict[str, Any]) -> Any:
    """A stock model holding what a checkpoint, or a view of one, reads."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(checkpoint.config, dtype=torch.float32).eval()
    weights = dict(checkpoint.read(checkpoint.layout.tensors(checkpoint.shape))) | replaced
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    return model


def _calibration(scratch: Path) -> Any:
    from shearling.data.sources import TextSource
    from shearling.repair.calibration import Calibration

    text = first_nine_tenths(text_file("redpajama/c4.jsonl", Path()), scratch)
    return Calibration((TextSource(text, share=1.0),))


def _perplexity(model: Any, windows: Any) -> float:
    from shearling.engine.products import fast_products
    from shearling.engine.stream import token_nll

    total = count = 0.0
    with fast_products():
        for ids in windows.split(2):
            nll = token_nll(model(ids, use_cache=False).logits[:, :-1], ids[:, 1:])
            total, count = total + float(nll.double().sum()), count + nll.numel()
    return math.exp(total / count)


def _restart_peak() -> None:
    with suppress(OSError):  # elsewhere than on Linux the peak is that of the process's life
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> float:
    match = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    return round(int(match[1]) / 1024, 1) if match else 0.0


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main()
