"""Layout x Keep -> a new checkpoint, with its proof.

The result is written beside its final place, loaded back as any user would load it, compared
with the source run without the removed units, and only then given its name.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shearling.axes import Keep, Selection
from shearling.checkpoint import Checkpoint, torch_dtype
from shearling.errors import ShearlingError
from shearling.manifest import MANIFEST, describe, read_manifest, stamp, versions
from shearling.progress import Progress, silent
from shearling.quiet import no_progress_bars
from shearling.stream import BlockStream
from shearling.writer import (
    check_output,
    check_space,
    new_directory,
    write_json,
    write_weights,
)

SHARD_BYTES = 10**9
TOLERANCE = 1e-4
# Weights aside, what a model directory needs to be loaded and used; copied byte for byte.
SIDE_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


@dataclass(frozen=True, slots=True)
class Proof:
    """How far the written checkpoint's logits are from the source's without the removed units.

    Attributes:
        max_abs_difference: largest difference of two logits.
        max_relative_difference: the same, over the source's largest absolute logit.
        tokens: positions compared.
        loaded_with: what read the result.
        passed: whether the relative difference is within 1e-4.
    """

    max_abs_difference: float
    max_relative_difference: float
    tokens: int
    loaded_with: str
    passed: bool


def cut(
    checkpoint: Checkpoint,
    keep: Keep,
    output: Path,
    *,
    options: Mapping[str, Any] | None = None,
    seed: int | None = None,
    stream: bool | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> Checkpoint:
    """Write the model that ``keep`` leaves of ``checkpoint``, and prove that it is that.

    Args:
        checkpoint: the source; never written to.
        keep: what survives.
        output: a new directory; it appears whole, or not at all.
        options: how ``keep`` came about, for the manifest.
        seed: of whatever was random about it, for the manifest.
        stream: prove the result block by block (True), load it whole with transformers (False),
            or go by the memory that is free (None).
        shard_bytes: largest size of a weight file, and what is held in memory while writing.
        progress: told how far the work is.

    Returns:
        A handle on the new model.

    Raises:
        ShearlingError: ``keep`` is not possible, ``output`` is taken, the disk is full, or the
            proof fails; nothing is left behind in any of these cases.
    """
    started = time.perf_counter()
    layout, shape = checkpoint.layout, checkpoint.shape
    after = layout.shape_after(keep, shape)
    selections = {s.target: s for s in layout.select(keep, shape)}
    sizes = {
        name: _numel(numel) * torch_dtype(checkpoint.dtypes[selections[name].source]).itemsize
        for name, numel in _target_shapes(checkpoint, keep, selections).items()
    }
    check_output(output)
    if output.resolve().is_relative_to(checkpoint.path.resolve()):
        raise ShearlingError(
            f"output {output} lies inside the source {checkpoint.path}, which is never written to; "
            "name a directory elsewhere."
        )
    check_space(output, sum(sizes.values()))
    with new_directory(output) as staging:
        _write_side_files(checkpoint, keep, staging)
        files = write_weights(
            staging,
            sizes,
            lambda names: _load(checkpoint, [selections[name] for name in names]),
            shard_bytes=shard_bytes,
            progress=progress,
        )
        written = Checkpoint.open(staging)
        proof = prove(checkpoint, keep, written, stream=stream, progress=progress)
        _require(proof, output)
        manifest = (
            {"kind": "manifest", "stage": "prune"}
            | stamp()
            | {
                "model": {"name": output.resolve().name, "fingerprint": written.fingerprint},
                "source": describe(checkpoint),
                "keep": keep.as_json(),
                "shape": dict(after),
                "source_shape": dict(shape),
                "parameters": written.parameters,
                "source_parameters": checkpoint.parameters,
                "bytes": written.bytes,
                "options": dict(options or {}),
                "seed": seed,
                "versions": versions(),
                "proof": _as_json(proof),
                "files": files,
                "seconds": round(time.perf_counter() - started, 2),
                "parent": read_manifest(checkpoint.path),
            }
        )
        write_json(staging / MANIFEST, manifest)
    return Checkpoint.open(output)


@torch.inference_mode()
def prove(
    checkpoint: Checkpoint,
    keep: Keep,
    written: Checkpoint,
    *,
    stream: bool | None = None,
    tokens: int = 32,
    progress: Progress = silent,
) -> Proof:
    """Compare the written model's logits with those of the source without the removed blocks.

    The source is run block by block from its own files. The written model is loaded by stock
    transformers, or, when it does not fit in memory or ``stream`` asks for it, block by block as
    well, its tensors having been matched with its configuration one by one.
    """
    assert keep.model.keys() | keep.blocks.keys() <= {"layers"}, "only whole blocks are proven yet"
    generator = torch.Generator().manual_seed(0)
    length = min(tokens, getattr(checkpoint.config, "max_position_embeddings", tokens))
    ids_BS = torch.randint(checkpoint.shape["vocab"], (2, length), generator=generator)
    progress("proving the cut", 0, 2)
    expected = _logits(checkpoint, ids_BS, keep.model.get("layers"))
    progress("proving the cut", 1, 2)
    whole = not stream if stream is not None else BlockStream(written).resident
    found = _stock_logits(written.path, ids_BS) if whole else _logits(written, ids_BS, None)
    progress("proving the cut", 2, 2)
    difference = float((found - expected).abs().max())
    relative = difference / max(float(expected.abs().max()), 1e-30)
    return Proof(
        max_abs_difference=difference,
        max_relative_difference=relative,
        tokens=ids_BS.numel(),
        loaded_with="AutoModelForCausalLM" if whole else "block by block",
        passed=relative <= TOLERANCE,
    )


def _logits(checkpoint: Checkpoint, ids_BS: Tensor, layers: tuple[int, ...] | None) -> Tensor:
    """Logits (B, S, V) of a model run from disk through ``layers`` alone."""
    stream = BlockStream(checkpoint, resident=False)
    h_BSD, calls = stream.begin(ids_BS)
    for index in range(stream.depth) if layers is None else layers:
        with stream.block(index) as block:
            h_BSD = calls[index](block, h_BSD)
    return stream.logits(h_BSD, ids_BS)


def _stock_logits(path: Path, ids_BS: Tensor) -> Tensor:
    """Logits (B, S, V) as stock transformers gives them, every tensor accounted for."""
    from transformers import AutoModelForCausalLM

    with no_progress_bars():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    model, info = loaded
    wrong = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys") if info[key]}
    if wrong:
        raise ShearlingError(
            f"the cut model does not load cleanly in transformers ({wrong}); "
            "nothing was written, please report this."
        )
    return model.eval()(input_ids=ids_BS, use_cache=False).logits


def _load(checkpoint: Checkpoint, selections: list[Selection]) -> dict[str, Tensor]:
    """Tensors of the result by name, in the order asked for; each source read once."""
    read = dict(checkpoint.read(selection.source for selection in selections))
    return {s.target: _select(read.pop(s.source), s) for s in selections}


def _select(tensor: Tensor, selection: Selection) -> Tensor:
    for dim, indices in enumerate(selection.indices):
        if indices is not None:
            tensor = tensor.index_select(dim, torch.tensor(indices))
    return tensor


def _target_shapes(
    checkpoint: Checkpoint, keep: Keep, selections: Mapping[str, Selection]
) -> dict[str, tuple[int, ...]]:
    """Sizes of the result's tensors, in the order of the selections."""
    shapes = checkpoint.layout.tensors(checkpoint.layout.shape_after(keep, checkpoint.shape))
    return {name: shapes[name] for name in selections}


def _numel(sizes: tuple[int, ...]) -> int:
    return torch.Size(sizes).numel()


def _write_side_files(checkpoint: Checkpoint, keep: Keep, staging: Path) -> None:
    layers = keep.model.get("layers", tuple(range(checkpoint.shape["layers"])))
    after = checkpoint.layout.shape_after(keep, checkpoint.shape)
    config = checkpoint.family.write(checkpoint.raw, checkpoint.config, after, layers)
    write_json(staging / "config.json", config)
    for pattern in SIDE_FILES:
        for file in checkpoint.path.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, staging / file.name)


def _require(proof: Proof, output: Path) -> None:
    if not proof.passed:
        raise ShearlingError(
            f"the proof of surgery failed for {output}: logits differ by "
            f"{proof.max_relative_difference:.1e} of the largest, {TOLERANCE:.0e} is allowed; "
            "nothing was written, please report this with the model's name."
        )


def _as_json(proof: Proof) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(proof)
