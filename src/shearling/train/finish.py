"""The end of a healing run: a stock checkpoint, its manifest, and its history for the report."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from shearling.data.store import Store
from shearling.files.staging import partial
from shearling.files.writer import plan_shards, sync_tree, write_json, write_weights
from shearling.model.checkpoint import Checkpoint
from shearling.model.dtypes import torch_dtype
from shearling.model.manifest import MANIFEST, ModelManifest, made_from, made_of
from shearling.model.refs import ModelRef
from shearling.model.side_files import copy_side_files, copy_without_code
from shearling.model.wrapping import around
from shearling.train import adapters
from shearling.train.log import read as read_log
from shearling.train.options import Options
from shearling.train.parallel import World
from shearling.train.results import HealingHistory, Look

CONFIG = "config.json"
RUN = "healing"  # in the output directory: checkpoints and logs, before and after the end
SHARD_BYTES = 10**9


def write(
    source: Checkpoint, model: nn.Module, output: Path, options: Options, store: Store,
    teacher: Mapping[str, Any] | None, world: World, reference: Mapping[str, float] | None = None,
) -> None:  # fmt: skip
    """Write the stock checkpoint into ``output``: the source's files with new weights.

    Its config.json comes last, so that a directory with one holds a whole model. ``reference``
    has the losses (nats, by domain) that a dynamic mix followed, for the report.
    """
    staging = output / RUN / ".model.partial"
    files = save(source, model, staging, world)
    if not world.first:
        return
    written = Checkpoint.open(staging)
    told = manifest(
        "heal", output.resolve().name, source, written, options, store,
        looks_at(_phase_folders(output)),
    )  # fmt: skip
    seconds = sum(_seconds(folder) for folder in _phase_folders(output))
    told = replace(
        told, teacher=None if teacher is None else dict(teacher), seconds=round(seconds, 2),
        files=files,
    )  # fmt: skip
    write_json(staging / MANIFEST, told.to_json())
    sync_tree(staging)
    write_json(output / RUN / "healing.json", _history(written, output, options, reference))
    move_into(output, staging)


def save(
    source: Checkpoint, model: nn.Module, directory: Path, world: World,
    change: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> dict[str, str]:  # fmt: skip
    """Write a model as a stock checkpoint with the source's side files, but for a manifest.

    All ranks have to call this; the first one writes.

    Args:
        source: what the model was made from.
        model: live, and sharded or not.
        directory: where; what is there is removed.
        world: ranks.
        change: gives a tensor's values as they are to be stored, from its name and values.

    Returns:
        File name -> SHA-256; nothing on ranks that do not write.
    """
    read = adapters.reader(model)
    homes = source.homes
    dtypes = {name: torch_dtype(dtype) for name, dtype in source.dtypes.items()}

    def own(wanted: list[str]) -> dict[str, Tensor]:
        tensors = ((name, homes[name].of(read(homes[name].parameter))) for name in wanted)
        return {
            name: change(name, tensor.cpu()).to(dtypes[name]).contiguous()
            for name, tensor in tensors
        }

    sizes, load = around(source.wrapping, homes, source.sizes, own)
    if not world.first:
        for shard_names in plan_shards(sizes, SHARD_BYTES):
            load(shard_names)
        return {}
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    files = write_weights(directory, sizes, load, shard_bytes=SHARD_BYTES)
    copy_without_code(source.path / CONFIG, directory / CONFIG)
    copy_side_files(source.path, directory)
    return files


def move_into(output: Path, staging: Path) -> None:
    """Move all files of a directory and remove it; last of all, config.json gets its name.

    With it the output is whole, and nobody would remove what is left besides.
    """
    configuration = partial(output / CONFIG)
    for file in sorted(staging.iterdir(), key=lambda file: (file.name == CONFIG, file.name)):
        file.replace(configuration if file.name == CONFIG else output / file.name)
    staging.rmdir()
    configuration.replace(output / CONFIG)


def _history(
    written: Checkpoint, output: Path, options: Options, reference: Mapping[str, float] | None
) -> dict[str, Any]:
    """What the report draws of a healing run."""
    return HealingHistory(
        model=ModelRef(output.resolve().name, written.fingerprint),
        recipe=options.recipe,
        looks=tuple(Look(**look) for look in looks_at(_phase_folders(output))),
        reference=dict(reference) if reference and options.mix == "dynamic" else None,
    ).to_json()


def looks_at(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Held-out losses and weights over all tokens of some phases' logs.

    ``seconds`` of a look are those of training until then, what held-out text took included.
    """
    looks: list[dict[str, Any]] = []
    before, tokens = 0.0, 0
    for folder in folders:
        records = read_log(folder)
        elapsed = _elapsed(records)
        looks += [
            {key: record[key] for key in ("losses", "weights")}
            | {"tokens": tokens + record["tokens"], "seconds": round(before + seconds, 2)}
            for record, seconds in zip(records, elapsed, strict=True)
            if record["kind"] == "eval"
        ]
        before += max(elapsed, default=0.0)
        tokens = max((look["tokens"] for look in looks), default=0)
    return looks


def _phase_folders(output: Path) -> list[Path]:
    return sorted(
        path for path in (output / RUN).iterdir() if path.is_dir() and path.name[0] != "."
    )


def manifest(
    stage: str, name: str, source: Checkpoint, written: Checkpoint, options: Options, store: Store,
    looks: Sequence[Mapping[str, Any]],
) -> ModelManifest:  # fmt: skip
    """What is said of every trained model.

    Args:
        stage: what made it.
        name: of the model.
        source: what was trained.
        written: the result.
        options: of the training; ``store``: its data.
        looks: at held-out text, with ``losses`` and ``weights`` by domain, oldest first.
    """
    return ModelManifest(
        stage=stage,
        **made_from(source),
        **made_of(written, name),
        options=options.model_dump(mode="json") | {"bos": store.bos is not None},
        store={"fingerprint": store.fingerprint, "domains": list(store.domains)},
        seed=options.seed,
        losses={"before": looks[0]["losses"], "after": looks[-1]["losses"]} if looks else None,
        final_weights=looks[-1]["weights"] if looks else None,
    )


def _seconds(folder: Path) -> float:
    """Of training in one phase."""
    return max(_elapsed(read_log(folder)), default=0.0)


def _elapsed(records: list[dict[str, Any]]) -> list[float]:
    """Seconds of training at each record of a phase.

    A run that was taken up again counts from zero; what was done before counts as well. Its
    first step says so; in an older log, only seconds that fall tell of it.
    """
    elapsed = []
    total = last = 0.0
    for record in records:
        seconds = record.get("seconds", last)
        if seconds < last or record.get("resumed"):
            last = 0.0
        total += seconds - last
        last = seconds
        elapsed.append(total)
    return elapsed
