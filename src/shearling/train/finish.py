"""The end of a healing run: a stock checkpoint, its manifest, and its history for the report."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from shearling.checkpoint import Checkpoint, torch_dtype
from shearling.data.store import Store
from shearling.manifest import MANIFEST, describe, read_manifest, stamp, versions
from shearling.train import adapters
from shearling.train.build import checkpoint_names
from shearling.train.log import read as read_log
from shearling.train.options import Options
from shearling.train.parallel import World
from shearling.writer import plan_shards, sync_tree, write_json, write_weights

RUN = "healing"  # in the output directory: checkpoints and logs, before and after the end
SHARD_BYTES = 10**9


def write(
    source: Checkpoint, model: nn.Module, output: Path, options: Options, store: Store,
    teacher: Checkpoint | None, world: World,
) -> None:  # fmt: skip
    """Write the stock checkpoint into ``output``: the source's files with new weights.

    Its config.json comes last, so that a directory with one holds a whole model.
    """
    read = adapters.reader(model)
    names = checkpoint_names(source)
    dtypes = {name: torch_dtype(dtype) for name, dtype in source.dtypes.items()}

    def load(wanted: list[str]) -> dict[str, Tensor]:
        return {name: read(names[name]).to("cpu", dtypes[name]).contiguous() for name in wanted}

    if not world.first:
        for shard_names in plan_shards(source.sizes, SHARD_BYTES):
            load(shard_names)
        return
    staging = output / RUN / ".model.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    files = write_weights(staging, source.sizes, load, shard_bytes=SHARD_BYTES)
    for file in sorted(source.path.iterdir()):
        side = file.is_file() and file.suffix != ".safetensors" and file.name != MANIFEST
        if side and not file.name.endswith(".index.json"):
            shutil.copyfile(file, staging / file.name)
    written = Checkpoint.open(staging)
    write_json(
        staging / MANIFEST,
        _manifest(source, written, output, options, store, teacher) | {"files": files},
    )
    sync_tree(staging)
    write_json(output / RUN / "healing.json", _history(written, output, options))
    last = ("config.json",)
    for file in sorted(staging.iterdir(), key=lambda file: (file.name in last, file.name)):
        file.replace(output / file.name)
    staging.rmdir()


def _history(written: Checkpoint, output: Path, options: Options) -> dict[str, Any]:
    """Held-out losses and weights over all tokens of all phases, for the report."""
    looks, before = [], 0
    for folder in _phase_folders(output):
        found = [record for record in read_log(folder) if record["kind"] == "eval"]
        looks += [
            {key: record[key] for key in ("losses", "weights")}
            | {"tokens": before + record["tokens"]}
            for record in found
        ]
        before = looks[-1]["tokens"]
    name = output.resolve().name
    return {"kind": "healing"} | stamp() | {
        "model": {"name": name, "fingerprint": written.fingerprint},
        "recipe": options.recipe, "looks": looks,
    }  # fmt: skip


def _phase_folders(output: Path) -> list[Path]:
    return sorted(
        path for path in (output / RUN).iterdir() if path.is_dir() and path.name[0] != "."
    )


def _manifest(
    source: Checkpoint, written: Checkpoint, output: Path, options: Options, store: Store,
    teacher: Checkpoint | None,
) -> dict[str, Any]:  # fmt: skip
    records = [record for folder in _phase_folders(output) for record in read_log(folder)]
    looks = [record for record in records if record["kind"] == "eval"]
    return {"kind": "manifest", "stage": "heal"} | stamp() | {
        "model": {"name": output.resolve().name, "fingerprint": written.fingerprint},
        "source": describe(source),
        "teacher": None if teacher is None else describe(teacher),
        "shape": dict(written.shape),
        "source_shape": dict(source.shape),
        "parameters": written.parameters,
        "source_parameters": source.parameters,
        "bytes": written.bytes,
        "versions": versions(),
        "options": options.model_dump(mode="json"),
        "store": {"fingerprint": store.fingerprint, "domains": list(store.domains)},
        "seed": options.seed,
        "losses": {"before": looks[0]["losses"], "after": looks[-1]["losses"]} if looks else None,
        "final_weights": looks[-1]["weights"] if looks else None,
        "seconds": round(sum(_seconds(folder) for folder in _phase_folders(output)), 2),
        "parent": read_manifest(source.path),
    }  # fmt: skip


def _seconds(folder: Path) -> float:
    """Of training in one phase; what was done before an interruption counts as well."""
    total = last = 0.0
    for record in read_log(folder):
        seconds = record.get("seconds", last)
        total += seconds - last if seconds >= last else seconds
        last = seconds
    return total
