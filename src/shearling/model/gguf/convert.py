"""A GGUF file as a model directory: configuration, weights in float32, tokenizer."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from shearling.errors import ShearlingError, shortened
from shearling.files.progress import Progress, silent
from shearling.files.writer import check_space, write_json, write_weights
from shearling.model.gguf.config import end_tokens, families_of, read_config
from shearling.model.gguf.header import GgufFile
from shearling.model.gguf.layout import file_names, from_file
from shearling.model.gguf.tokenizer import write_tokenizer
from shearling.model.gguf.weights import GgufWeights
from shearling.table.families import Family
from shearling.table.values import Shape

SHARD_BYTES = 2**28  # at once in memory; a larger tensor is alone in its file
TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def known(file: GgufFile) -> bool:
    """Whether a file is of one of our families, so that all of it is understood."""
    return bool(families_of(file.architecture))


def convert_gguf(file: GgufFile, directory: Path, progress: Progress = silent) -> None:
    """Write what a GGUF file holds as a model directory that transformers loads.

    Args:
        file: the header, of a family of ours (:func:`known`).
        directory: an empty one.
        progress: told the bytes written.

    Raises:
        ShearlingError: something in the file is not understood, contradicts itself or is missing.
    """
    weights = GgufWeights(file)
    family, config = read_config(file, weights.small)
    layout, shape = family.layout(config), family.shape(config)
    sizes = layout.tensors(shape)
    names = stored_names(file, family, shape, sizes)
    bytes_of = {name: 4 * math.prod(size) for name, size in sizes.items()}
    check_space(directory / "model", sum(bytes_of.values()))
    write_tokenizer(file, directory)
    places = layout.places(shape)

    def load(wanted: list[str]) -> dict[str, Tensor]:
        return {
            name: from_file(
                family, shape, name, places[name][0], weights.read(names[name])
            ).contiguous()
            for name in wanted
        }

    config.architectures = [architecture_of(family)]
    config.save_pretrained(directory)
    ends = {"eos_token_id": end_tokens(file.metadata), "bos_token_id": config.bos_token_id}
    write_json(directory / "generation_config.json", ends | {"pad_token_id": config.pad_token_id})
    write_weights(directory, bytes_of, load, shard_bytes=SHARD_BYTES, progress=progress)


def stored_names(
    file: GgufFile, family: Family, shape: Shape, sizes: dict[str, tuple[int, ...]]
) -> dict[str, str]:
    """Name in a checkpoint -> name in the file, every tensor on both sides accounted for."""
    found = file_names(list(sizes), file.architecture, shape["layers"]) or {}
    names: dict[str, str] = {}
    for name, size in sizes.items():
        stored = found.get(name)
        if stored is None or stored not in file.tensors:
            raise _wrong(file, f"lacks {stored or name}, which its metadata call for")
        if file.tensors[stored].sizes != size:
            raise _wrong(
                file,
                f"stores {stored} as {list(file.tensors[stored].sizes)}, and its metadata call "
                f"for {list(size)}",
            )
        names[name] = stored
    left = file.tensors.keys() - names.values() - {*TABLES}
    if left:
        raise _wrong(file, f"holds {min(left)}, which a {family.model_type} model does not have")
    return names


def architecture_of(family: Family) -> str:
    """transformers' name of the class of a family's causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type]


def _wrong(file: GgufFile, what: str) -> ShearlingError:
    return ShearlingError(
        f"{file.path} {shortened(what)}; fetch it again, or give the model's safetensors instead."
    )
