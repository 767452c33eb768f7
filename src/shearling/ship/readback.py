"""An exported file read back and compared with the model that it was made from.

Every tensor, one at a time, and everything that the metadata say of sizes. llama.cpp lays some
tensors out in another way; the comparison does the same to the source's.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.model.checkpoint import Checkpoint
from shearling.model.gguf.header import GgufFile, gguf_package
from shearling.model.gguf.layout import file_names, parts
from shearling.model.gguf.weights import GgufWeights
from shearling.ship.llama_run import LlamaRun
from shearling.table.axes import Row

# How far a tensor may be from the source's, root mean square over that of the source: a tensor in
# the wrong place or order is 1.4 away, four bits 0.1, two bits 0.3.
LOSSY = 0.6
# Axis -> what llama.cpp calls its size, behind the architecture's name.
_KEYS = {
    "layers": "block_count",
    "hidden": "embedding_length",
    "mlp": "feed_forward_length",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "experts": "expert_count",
    "expert_mlp": "expert_feed_forward_length",
}
_EXPERT = "{}."  # the place of an expert's number in a tensor's name
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


Places = dict[str, tuple[Row, int | None]]  # name -> its row, and the block that it is in


@dataclass(frozen=True, slots=True)
class _Held:
    """Where a tensor of a file comes from.

    Attributes:
        names: the source's tensors in it: one, or those of all experts.
        part: which part of what the file holds of them, by the name that converters know.
    """

    names: tuple[str, ...]
    part: str


@dataclass(frozen=True, slots=True)
class GgufProof:
    """What was found when an exported file was read back.

    Attributes:
        architecture: llama.cpp's name of it.
        tensors: compared, one for one.
        types: how many tensors are stored in which type.
        exact: tensors equal to the source's, rounded to a type of 16 or 32 bits.
        largest_error: of all tensors stored in fewer bits, the largest root mean square of the
            difference over that of the source; 0 where there are none.
        remarks: sentences on what llama.cpp will do otherwise.
        run: how far what llama.cpp computes is from the model, where it is installed.
    """

    architecture: str
    tensors: int
    types: dict[str, int]
    exact: int
    largest_error: float
    remarks: tuple[str, ...] = ()
    run: LlamaRun | None = None


def prove(source: Checkpoint, file: Path, *, progress: Progress = silent) -> GgufProof:
    """Read a GGUF file back and compare it with the model it was made from.

    Sizes are compared with the source's shape, and every tensor, one at a time, with the source's:
    types of 16 and 32 bits exactly, smaller ones within what their rounding explains.

    Raises:
        ShearlingError: the file does not stand for the model.
    """
    header = open_back(file)
    _check_sizes(source, header)
    held = {name: t for name, t in header.tensors.items() if not name.startswith("rope_")}
    places = source.layout.places(source.shape)
    stored_as = _stored_as(source, places, header.architecture, set(held))
    gguf, weights = gguf_package(), GgufWeights(header)
    kinds = {name: gguf.GGMLQuantizationType(held[name].kind).name for name in stored_as}
    exact, largest = 0, 0.0
    for done, (name, of) in enumerate(stored_as.items()):
        progress("reading the file back", done, len(stored_as))
        expected, stored = _expected(source, places, of), weights.read(name)
        if places[of.names[0]][0].role == "embedding":  # Gemma's loses rows that no token has
            _check_rows(header, len(stored))
            expected = expected[: len(stored)]
        error = _difference(of.names[0], expected, stored, kinds[name])
        exact += kinds[name] in _TYPES
        largest = max(largest, error)
    progress("reading the file back", len(stored_as), len(stored_as))
    counted = dict(Counter(kinds.values()))
    remarks = _remarks(source, header)
    return GgufProof(header.architecture, len(stored_as), counted, exact, largest, remarks)


def open_back(file: Path) -> GgufFile:
    """The header of an exported file (ShearlingError, the exporter's, if there is none)."""
    try:
        return GgufFile.open(file)
    except ShearlingError as error:
        raise differs(f"cannot be read back ({str(error).rstrip('.')})") from error


def _check_sizes(source: Checkpoint, file: GgufFile) -> None:
    """Compare the sizes that llama.cpp will read with those of the model."""

    def size(key: str) -> int | None:
        value = file.get(key)
        if isinstance(value, list) and len(set(value)) == 1:  # the same for every block
            value = value[0]
        return value if isinstance(value, int) else None

    facts = source.family.llama_cpp
    for axis, key in (_KEYS | dict(facts.sizes if facts is not None else {})).items():
        if axis not in source.shape:
            continue
        stored = size(key)
        if stored is None and axis == "head_dim":  # then llama.cpp divides
            stored = (size(_KEYS["hidden"]) or 0) // (size(_KEYS["heads"]) or 1)
        if stored is not None and stored != source.shape[axis]:
            raise differs(
                f"gives {axis}={stored} where the model has {source.shape[axis]}, which llama.cpp "
                f"cannot express for {file.architecture}"
            )


def _check_rows(file: GgufFile, rows: int) -> None:
    """As many embeddings as tokens: llama.cpp opens no other file."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) != rows:
        raise differs(f"has {rows} embeddings for {len(tokens)} tokens, which llama.cpp refuses")


def _remarks(source: Checkpoint, file: GgufFile) -> tuple[str, ...]:
    """What the file cannot say of the model, and what llama.cpp does otherwise therefore."""
    return tuple(filter(None, (_window_remark(source), _yarn_remark(source))))


def _window_remark(source: Checkpoint) -> str:
    """A sliding window that llama.cpp would not keep to, or only newer versions of it."""
    window = getattr(source.config, "sliding_window", None)
    kinds = getattr(source.config, "layer_types", None)
    longest = getattr(source.config, "max_position_embeddings", 0)
    if not window or window >= longest or (kinds and "sliding_attention" not in kinds):
        return ""
    facts = source.family.llama_cpp
    if facts is None or not facts.slides:
        return (
            f"llama.cpp lets every position of a {source.family.model_type} model attend to all "
            f"before it, where this one has a sliding window of {window}: longer texts will differ"
        )
    if facts.listed and facts.kinds(source.shape["layers"]) != tuple(kinds or ()):
        return (
            "the file lists which blocks have a sliding window; older versions of llama.cpp may "
            "count blocks instead, and run another model"
        )
    return ""


def _yarn_remark(source: Checkpoint) -> str:
    """llama.cpp begins and ends YaRN at whole channels."""
    rope = getattr(source.config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "yarn" or rope.get("truncate", True):
        return ""
    return (
        "llama.cpp rounds the channels at which YaRN begins and ends, which this model "
        "(truncate=false) does not: its log-probabilities differ by some hundredths"
    )


def _stored_as(
    source: Checkpoint, places: Places, architecture: str, held: set[str]
) -> dict[str, _Held]:
    """Name in the file -> what of the source is in it, every tensor on both sides accounted for."""
    together = {
        part: _Held(names, part)
        for names in _together(source, places)
        for part in _parts_of(source, places, names)
    }
    names = file_names(list(together), architecture, source.shape["layers"])
    if names is None:
        raise differs(f"is of the architecture {architecture}, which the gguf package lacks")
    missing = [name for name, other in names.items() if other not in held]
    left = held - {*names.values()}
    if missing or left or len(set(names.values())) != len(names):
        what = (
            f"lacks {missing[0]}" if missing else f"holds {min(left, default='a tensor')} besides"
        )
        raise differs(what)
    return {str(other): together[name] for name, other in names.items()}


def _together(source: Checkpoint, places: Places) -> list[tuple[str, ...]]:
    """The source's tensors, the matrices of all experts of a block in one group."""
    groups: dict[str, tuple[str, ...]] = {}
    for name in source.files:
        row, block = places[name]
        if row.name in source.family.stacked and block is not None:
            groups[_merged(row, block)] = tuple(row.names(block, source.shape))
        else:
            groups[name] = (name,)
    return list(groups.values())


def _merged(row: Row, block: int) -> str:
    """The name that the matrices of all experts have together."""
    experts, _, matrix = row.name.rpartition(_EXPERT)
    return f"{experts}{matrix}".format(block)


def _parts_of(source: Checkpoint, places: Places, names: tuple[str, ...]) -> list[str]:
    """Under which names a file holds some tensors."""
    row, block = places[names[0]]
    if len(names) > 1 and block is not None:
        return [_merged(row, block)]
    sizes = tuple(dim.size(source.shape) for dim in row.dims)
    blank = torch.empty(sizes, device="meta")
    return list(parts(source.family, source.config, source.shape, names[0], row, blank))


def _expected(source: Checkpoint, places: Places, of: _Held) -> Tensor:
    """What a file must hold of some tensors: of one, or of all experts one after the other."""
    read = {
        name: parts(source.family, source.config, source.shape, name, places[name][0], tensor)
        for name, tensor in source.read(of.names)
    }
    if len(of.names) == 1:
        return read[of.names[0]][of.part]
    return torch.stack([read[name][name] for name in of.names])


def _difference(name: str, expected: Tensor, stored: Tensor, kind: str) -> float:
    """How far a tensor is from the source's, relative; types of 16 bits and more must keep it."""
    if expected.squeeze().shape == stored.squeeze().shape:  # a file may drop a single row's
        expected = expected.reshape(stored.shape)
    if expected.shape != stored.shape:
        raise differs(f"stores {name} as {list(stored.shape)} instead of {list(expected.shape)}")
    if kind in _TYPES:
        rounded = expected.to(_TYPES[kind]).float()
        if not torch.isfinite(rounded).all():
            raise differs(f"cannot hold {name} in {kind}, whose range it exceeds (use bf16)")
        if not torch.equal(rounded, stored):
            raise differs(f"stores other values for {name}")
        return 0.0
    error = float((stored - expected).norm() / expected.norm().clamp_min(1e-30))
    if not error < LOSSY:
        raise differs(f"stores {name} with a relative error of {error:.2f}")
    return error


def differs(what: str) -> ShearlingError:
    """The sentence for a file that does not stand for its model."""
    return ShearlingError(
        f"the exported GGUF file {what}; nothing was written, give another type or model, or "
        "another version of llama.cpp."
    )
