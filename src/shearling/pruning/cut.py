"""Layout x Keep -> a new checkpoint, with its proof.

The result is written beside its final place, loaded back as any user would load it, compared
with the source whose removed units are masked, and only then given its name.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from shearling.engine.place import Place
from shearling.engine.views.cut import CutTensors
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.files.reading import read_json
from shearling.files.writer import (
    check_output,
    check_outside,
    check_space,
    new_directory,
    write_json,
    write_weights,
)
from shearling.model.checkpoint import Checkpoint
from shearling.model.dtypes import torch_dtype
from shearling.model.manifest import (
    MANIFEST,
    ModelManifest,
    WrittenProof,
    made_from,
    made_of,
)
from shearling.model.remote_code import without_code
from shearling.model.side_files import copy_side_files, tokenizer_files
from shearling.model.wrapping import around
from shearling.pruning.proof import prove, require
from shearling.table.values import Cut, Keep, Selection

# Target tensor name -> what gives it, in the result's shape; called when its shard is written.
Replaced = Mapping[str, Callable[[], Tensor]]

SHARD_BYTES = 10**9
GENERATION = "generation_config.json"


def cut(
    checkpoint: Checkpoint,
    keep: Keep | Cut,
    output: Path,
    *,
    replaced: Replaced | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int | None = None,
    place: Place | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> Checkpoint:
    """Write the model that ``keep`` leaves of ``checkpoint``, and prove that it is that.

    Args:
        checkpoint: the source; never written to.
        keep: what survives.
        output: a new directory; it appears whole, or not at all.
        replaced: tensors of the result that a repair has solved anew: name in the result -> a
            function that gives it, in the result's shape; rounded to the type stored.
        options: how ``keep`` came about, for the manifest.
        seed: of whatever was random about it, for the manifest.
        place: where it is proved: whole with stock transformers if a model fits there, or block
            by block; chosen by the memory that is free, if not given.
        shard_bytes: largest size of a weight file, and what is held in memory while writing.
        progress: told how far the work is.

    Returns:
        A handle on the new model.

    Raises:
        ShearlingError: ``keep`` is not possible, the architecture cannot express what it leaves
            (the nearest shapes it can are named), ``output`` is taken, the disk is full, or the
            proof fails; nothing is left behind in any of these cases.
    """
    started = time.perf_counter()
    replaced = replaced or {}
    expanded = checkpoint.layout.cut(keep, checkpoint.shape)
    sizes = _sizes(checkpoint, expanded)

    def load(names: list[str]) -> dict[str, Tensor]:
        return _load(checkpoint, expanded, names, replaced)

    _check(checkpoint, expanded, output, replaced.keys() - sizes.keys())
    result = replace(checkpoint, layout=checkpoint.layout.after(expanded), shape=expanded.after)
    sizes, load_all = around(checkpoint.wrapping, result.homes, sizes, load)
    check_space(output, sum(sizes.values()))
    with new_directory(output, progress) as staging, ThreadPoolExecutor(1) as reader:
        _write_side_files(checkpoint, expanded, staging)
        files = write_weights(
            staging,
            sizes,
            load_all,
            shard_bytes=shard_bytes,
            progress=progress,
        )
        written = Checkpoint.open(staging)
        # Reading every byte of both takes as long as the proof does, and beside it no time.
        fingerprints = reader.submit(lambda: (checkpoint.fingerprint, written.fingerprint))
        proof = prove(
            checkpoint, expanded, written, changed=replaced.keys(), place=place, progress=progress
        )
        require(proof, output)
        fingerprints.result()
        manifest = ModelManifest(
            stage="prune",
            **made_from(checkpoint),
            **made_of(written, output.resolve().name),
            keep=expanded.keep.as_json(),
            options=dict(options or {}),
            seed=seed,
            proof=WrittenProof(**asdict(proof)),
            repaired=tuple(sorted(replaced)),
            files=files,
            seconds=round(time.perf_counter() - started, 2),
        )
        write_json(staging / MANIFEST, manifest.to_json())
    return Checkpoint.open(output)


def written_bytes(checkpoint: Checkpoint, keep: Keep | Cut) -> int:
    """How much the tensors of a cut take on disk."""
    return sum(_sizes(checkpoint, checkpoint.layout.cut(keep, checkpoint.shape)).values())


def _check(checkpoint: Checkpoint, cut: Cut, output: Path, unknown: Collection[str]) -> None:
    """Refuse what cannot work before any work is done."""
    checkpoint.family.check(checkpoint.config, cut.after)
    if unknown:
        raise ShearlingError(
            f"{min(unknown)} was to be replaced, but the result has no such tensor; "
            "name tensors as the result does, blocks counted after the cut."
        )
    check_output(output)
    check_outside(output, checkpoint.path)
    files = [file.name for file in tokenizer_files(checkpoint.path)]
    if "vocab" in cut.keep.model and files and "tokenizer.json" not in files:
        raise ShearlingError(
            f"the tokenizer of {checkpoint.path} ({files[0]}) cannot be cut along with the "
            "vocabulary, for which a tokenizer.json is needed; save it as a fast tokenizer first."
        )


def _load(
    checkpoint: Checkpoint, cut: Cut, names: Iterable[str], replaced: Replaced
) -> dict[str, Tensor]:
    """Tensors of the result by name, in the order asked for; each source read once."""
    names = list(names)
    tensors = CutTensors(checkpoint.tensors, cut, checkpoint.family)
    read = dict(tensors.read(name for name in names if name not in replaced))
    shapes = checkpoint.layout.after(cut).tensors(cut.after)
    return {
        name: _cast(checkpoint, replaced[name](), cut.by_target[name], shapes[name])
        if name in replaced
        else read.pop(name)
        for name in names
    }


def _cast(
    checkpoint: Checkpoint, tensor: Tensor, selection: Selection, sizes: tuple[int, ...]
) -> Tensor:
    """A replaced tensor as it is stored."""
    if tuple(tensor.shape) != sizes:
        raise ShearlingError(
            f"{selection.target} was replaced by a tensor of {list(tensor.shape)}, but the result "
            f"holds {list(sizes)}; repair it in the shape after the cut."
        )
    return tensor.detach().to(torch_dtype(checkpoint.dtypes[selection.source])).contiguous()


def _sizes(checkpoint: Checkpoint, cut: Cut) -> dict[str, int]:
    """Bytes of the result's tensors, in the order of the selections."""
    shapes = checkpoint.layout.after(cut).tensors(cut.after)
    return {
        s.target: math.prod(shapes[s.target]) * torch_dtype(checkpoint.dtypes[s.source]).itemsize
        for s in cut.selections
    }


def _write_side_files(checkpoint: Checkpoint, cut: Cut, staging: Path) -> None:
    config = checkpoint.family.write(checkpoint.raw, checkpoint.config, cut.after, cut.layers)
    vocab = cut.keep.model.get("vocab")
    copy_side_files(checkpoint.path, staging, tokenizer=vocab is None)
    if vocab is not None:
        from shearling.pruning.vocabulary import renumber_ids, rewrite_tokenizer

        config = renumber_ids(config, vocab)
        if (staging / GENERATION).exists():
            generation = renumber_ids(read_json(staging / GENERATION), vocab)
            write_json(staging / GENERATION, generation)
        if (checkpoint.path / "tokenizer.json").is_file():
            rewrite_tokenizer(checkpoint.path, vocab, staging)
    if checkpoint.wrapping is not None:
        config = checkpoint.wrapping.config(config)
    write_json(staging / "config.json", without_code(config))
