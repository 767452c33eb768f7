"""Layout x Keep -> a new checkpoint, with its proof.

The result is written beside its final place, loaded back as any user would load it, compared
with the source whose removed units are masked, and only then given its name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shearling.engine.place import Place
from shearling.engine.stream import BlockStream
from shearling.engine.views.cut import select
from shearling.engine.views.masked import masked_logits
from shearling.engine.walk import logits_of
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.files.reading import read_json
from shearling.files.writer import (
    check_output,
    check_space,
    new_directory,
    write_json,
    write_weights,
)
from shearling.model.checkpoint import Checkpoint
from shearling.model.dtypes import name_of, torch_dtype
from shearling.model.loading import stock_model
from shearling.model.manifest import MANIFEST, describe, read_manifest, stamp, versions
from shearling.model.remote_code import without_code
from shearling.model.side_files import copy_side_files, tokenizer_files
from shearling.table.axes import Keep, Selection, Shape

# Target tensor name -> what gives it, in the result's shape; called when its shard is written.
Replaced = Mapping[str, Callable[[], Tensor]]

SHARD_BYTES = 10**9
TOLERANCE = 1e-4
GENERATION = "generation_config.json"


@dataclass(frozen=True, slots=True)
class Proof:
    """How far the written checkpoint's logits are from the source's with removed units masked.

    Attributes:
        max_abs_difference: largest difference of two logits.
        max_relative_difference: the same, over the source's largest absolute logit.
        tokens: positions compared.
        loaded_with: what read the result.
        computed_in: the precision in which both were run.
        passed: whether the relative difference is within 1e-4.
    """

    max_abs_difference: float
    max_relative_difference: float
    tokens: int
    loaded_with: str
    computed_in: str
    passed: bool


def cut(
    checkpoint: Checkpoint,
    keep: Keep,
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
    after = checkpoint.layout.shape_after(keep, checkpoint.shape)
    selections = {s.target: s for s in checkpoint.layout.select(keep, checkpoint.shape)}
    sizes = _sizes(checkpoint, after, selections)
    _check(checkpoint, keep, after, output, replaced.keys() - selections.keys())
    check_space(output, sum(sizes.values()))
    with new_directory(output) as staging:
        _write_side_files(checkpoint, keep, after, staging)
        files = write_weights(
            staging,
            sizes,
            lambda names: _load(checkpoint, after, [selections[name] for name in names], replaced),
            shard_bytes=shard_bytes,
            progress=progress,
        )
        written = Checkpoint.open(staging)
        proof = prove(
            checkpoint, keep, written, changed=replaced.keys(), place=place, progress=progress
        )
        _require(proof, output)
        manifest = _manifest(checkpoint, keep, written, proof) | {
            "model": {"name": output.resolve().name, "fingerprint": written.fingerprint},
            "options": dict(options or {}),
            "seed": seed,
            "files": files,
            "seconds": round(time.perf_counter() - started, 2),
        }
        if replaced:
            manifest["repaired"] = sorted(replaced)
        write_json(staging / MANIFEST, manifest)
    return Checkpoint.open(output)


def written_bytes(checkpoint: Checkpoint, keep: Keep) -> int:
    """How much the tensors of a cut take on disk."""
    after = checkpoint.layout.shape_after(keep, checkpoint.shape)
    selections = {s.target: s for s in checkpoint.layout.select(keep, checkpoint.shape)}
    return sum(_sizes(checkpoint, after, selections).values())


@torch.inference_mode()
def prove(
    checkpoint: Checkpoint,
    keep: Keep,
    written: Checkpoint,
    *,
    changed: Collection[str] = (),
    place: Place | None = None,
    tokens: int = 32,
    progress: Progress = silent,
) -> Proof:
    """Compare the written model's logits with those of the source with removed units masked.

    The source is run block by block from its own files. The written model is loaded by stock
    transformers, or, when it does not fit in memory or ``place`` streams, block by block as well,
    its tensors having been matched with its configuration one by one.

    Args:
        checkpoint: the source.
        keep: what survives of it.
        written: the result.
        changed: names of the result's tensors that are no cuts of the source's; the masked source
            takes them from the result, so that they prove their place but not their values.
        place: see ``cut``.
        tokens: length of the two sequences compared.
        progress: told how far the work is.

    Raises:
        ShearlingError: ``keep`` is not possible, or the result does not load cleanly.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(tokens, getattr(checkpoint.config, "max_position_embeddings", tokens))
    ids_BS = torch.randint(written.shape["vocab"], (2, length), generator=generator)
    vocab = keep.model.get("vocab")
    source_ids_BS = ids_BS if vocab is None else torch.tensor(vocab)[ids_BS]
    replaced = _Stored(written, frozenset(changed))
    place = place or Place.best(checkpoint)
    place.for_proof().settle()

    def compare(dtype: torch.dtype) -> Proof:
        progress("proving the cut", 0, 2)
        expected_BSV = masked_logits(
            checkpoint, keep, source_ids_BS, replaced=replaced, place=place.for_proof(dtype)
        )
        progress("proving the cut", 1, 2)
        whole = place.holds(written, dtype)
        run = _stock_logits if whole else _streamed_logits
        found_BSV = run(written, ids_BS, place.for_proof(dtype))
        progress("proving the cut", 2, 2)
        difference = float((found_BSV - expected_BSV).abs().max())
        relative = difference / max(float(expected_BSV.abs().max()), 1e-30)
        return Proof(
            max_abs_difference=difference,
            max_relative_difference=relative,
            tokens=ids_BS.numel(),
            loaded_with="AutoModelForCausalLM" if whole else "block by block",
            computed_in=name_of(dtype),
            passed=relative <= TOLERANCE,
        )

    proof = compare(torch.float32)
    # A narrower matrix is summed in another order, and many blocks amplify the rounding: to 3e-5
    # over SmolLM2's thirty, cut to 480 channels at random. In double precision, where that is
    # exactly 0, only a fault is left.
    return proof if proof.passed else compare(torch.float64)


@dataclass(frozen=True)
class _Stored(Mapping[str, Tensor]):
    """Some of a checkpoint's tensors, each read when it is asked for."""

    checkpoint: Checkpoint
    names: frozenset[str]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return next(tensor for _, tensor in self.checkpoint.read([name]))

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _streamed_logits(checkpoint: Checkpoint, ids_BS: Tensor, place: Place) -> Tensor:
    """Logits (B, S, V), block by block."""
    return logits_of(BlockStream(checkpoint, place), ids_BS)


def _stock_logits(checkpoint: Checkpoint, ids_BS: Tensor, place: Place) -> Tensor:
    """Logits (B, S, V) as stock transformers gives them, every tensor accounted for."""
    model, info = stock_model(checkpoint.path, place.dtype, **place.loading())
    wrong = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys") if info[key]}
    if wrong:
        raise ShearlingError(
            f"the cut model does not load cleanly in transformers ({wrong}); "
            "nothing was written, please report this."
        )
    model = model.eval().to(place.device)
    return model(input_ids=ids_BS.to(place.device), use_cache=False).logits


def _check(
    checkpoint: Checkpoint, keep: Keep, after: Shape, output: Path, unknown: Collection[str]
) -> None:
    """Refuse what cannot work before any work is done."""
    checkpoint.family.check(checkpoint.config, after)
    if unknown:
        raise ShearlingError(
            f"{min(unknown)} was to be replaced, but the result has no such tensor; "
            "name tensors as the result does, blocks counted after the cut."
        )
    check_output(output)
    if output.resolve().is_relative_to(checkpoint.path.resolve()):
        raise ShearlingError(
            f"output {output} lies inside the source {checkpoint.path}, which is never written to; "
            "name a directory elsewhere."
        )
    files = [file.name for file in tokenizer_files(checkpoint.path)]
    if "vocab" in keep.model and files and "tokenizer.json" not in files:
        raise ShearlingError(
            f"the tokenizer of {checkpoint.path} ({files[0]}) cannot be cut along with the "
            "vocabulary, for which a tokenizer.json is needed; save it as a fast tokenizer first."
        )


def _load(
    checkpoint: Checkpoint, after: Shape, selections: list[Selection], replaced: Replaced
) -> dict[str, Tensor]:
    """Tensors of the result by name, in the order asked for; each source read once."""
    sources = [s.source for s in selections if s.target not in replaced]
    read = dict(checkpoint.read(sources))
    shapes = checkpoint.layout.tensors(after)
    return {
        s.target: select(checkpoint, after, read.pop(s.source), s)
        if s.target not in replaced
        else _cast(checkpoint, replaced[s.target](), s, shapes[s.target])
        for s in selections
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


def _sizes(
    checkpoint: Checkpoint, after: Shape, selections: Mapping[str, Selection]
) -> dict[str, int]:
    """Bytes of the result's tensors, in the order of the selections."""
    shapes = checkpoint.layout.tensors(after)
    return {
        name: torch.Size(shapes[name]).numel()
        * torch_dtype(checkpoint.dtypes[selection.source]).itemsize
        for name, selection in selections.items()
    }


def _write_side_files(checkpoint: Checkpoint, keep: Keep, after: Shape, staging: Path) -> None:
    layers = keep.model.get("layers", tuple(range(checkpoint.shape["layers"])))
    config = checkpoint.family.write(checkpoint.raw, checkpoint.config, after, layers)
    vocab = keep.model.get("vocab")
    copy_side_files(checkpoint.path, staging, tokenizer=vocab is None)
    if vocab is not None:
        from shearling.pruning.vocabulary import renumber_ids, rewrite_tokenizer

        config = renumber_ids(config, vocab)
        if (staging / GENERATION).exists():
            generation = renumber_ids(read_json(staging / GENERATION), vocab)
            write_json(staging / GENERATION, generation)
        if (checkpoint.path / "tokenizer.json").is_file():
            rewrite_tokenizer(checkpoint.path, vocab, staging)
    write_json(staging / "config.json", without_code(config))


def _manifest(
    checkpoint: Checkpoint, keep: Keep, written: Checkpoint, proof: Proof
) -> dict[str, Any]:
    return (
        {"kind": "manifest", "stage": "prune"}
        | stamp()
        | {
            "source": describe(checkpoint),
            "keep": keep.as_json(),
            "shape": dict(written.shape),
            "source_shape": dict(checkpoint.shape),
            "parameters": written.parameters,
            "source_parameters": checkpoint.parameters,
            "bytes": written.bytes,
            "versions": versions(),
            "proof": asdict(proof),
            "parent": read_manifest(checkpoint.path),
        }
    )


def _require(proof: Proof, output: Path) -> None:
    if not proof.passed:
        raise ShearlingError(
            f"the proof of surgery failed for {output}: logits differ by "
            f"{proof.max_relative_difference:.1e} of the largest, {TOLERANCE:.0e} is allowed; "
            "nothing was written, please report this with the model's name."
        )
