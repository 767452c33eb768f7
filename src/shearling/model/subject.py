"""What can be measured: checkpoints that shearling cuts, and models that only run.

A quantised directory has no tensors that the families' tables know, and some architectures have no
table; stock transformers runs both. They get a lighter handle with what measuring needs of one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from shearling.files.reading import read_json
from shearling.model.checkpoint import Checkpoint, directory_name, table_of
from shearling.model.fingerprint import fingerprint
from shearling.model.loading import build_model, load_config, load_tokenizer
from shearling.model.resolve import resolve
from shearling.model.stored import stored_tensors
from shearling.model.weight_files import no_weights, weight_files
from shearling.table.families import FAMILIES
from shearling.table.families.wrappers import is_known
from shearling.table.layout import Layout
from shearling.table.values import Shape

_AXES = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp": "intermediate_size",
    "vocab": "vocab_size",
}


@dataclass(frozen=True)
class Subject:
    """A model directory that stock transformers runs, and that shearling does not cut.

    Attributes:
        path: the directory.
        raw: config.json as it is written.
        config: the same, resolved by transformers.
        layout: the architecture's table, for what it says of sizes and costs; None if unknown.
        shape: sizes by axis, those that the configuration gives.
        parameters: of the model before it was quantised, tied ones once.
    """

    path: Path
    raw: Mapping[str, Any]
    config: Any
    layout: Layout | None
    shape: Shape
    parameters: int

    @property
    def name(self) -> str:
        """The directory's name, or the hub's when the directory is a snapshot of it."""
        return directory_name(self.path)

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """What config.json says of how the weights were rounded; None where they were not."""
        return quantization(self.raw)

    @cached_property
    def bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(file.stat().st_size for file in _weights(self.path))

    @cached_property
    def fingerprint(self) -> str:
        """As a checkpoint's: see ``shearling.model.fingerprint``."""
        stored = stored_tensors(self.path, _weights(self.path))
        return fingerprint(self.raw, {name: tensor.file for name, tensor in stored.items()})

    def tokenizer(self) -> Any:
        """The tokenizer that lies beside the weights."""
        return load_tokenizer(self.path)


# A model that was opened to be measured: what both offer is all that measuring needs.
OpenedModel = Checkpoint | Subject


def open_subject(model: str | Path, *, merge_adapter: bool = False) -> OpenedModel:
    """Open a model to be measured.

    Args:
        model: a model directory, a ``.gguf`` file or a hub id.
        merge_adapter: whether an adapter in the directory is merged (once, into the cache).

    Returns:
        A checkpoint wherever shearling knows the architecture and the weights are not quantised;
        otherwise a handle with the same ``name``, ``path``, ``fingerprint``, ``parameters``,
        ``bytes``, ``shape``, ``config`` and ``tokenizer()``, and a ``layout`` where there is one.

    Raises:
        ShearlingError: nothing there, no safetensors, or what :meth:`Checkpoint.open` refuses.
    """
    path = resolve(model, merge_adapter=merge_adapter)
    raw = read_json(path / "config.json")
    known = str(raw.get("model_type")) in FAMILIES
    wrapped = is_known(raw)
    if (known or wrapped) and quantization(raw) is None:
        return Checkpoint.open(path)
    _weights(path)
    config = load_config(path).get_text_config()
    if not known:
        return Subject(path, raw, config, None, _sizes(config), _counted(config, path))
    family = FAMILIES[raw["model_type"]]
    layout, shape = table_of(family, config, path)
    return Subject(path, raw, config, layout, shape, layout.count(shape))


def quantization(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a config.json says of quantisation, or None."""
    found = raw.get("quantization_config")
    return found if isinstance(found, Mapping) else None


def _weights(path: Path) -> list[Path]:
    """The safetensors files of a directory, at least one."""
    files = weight_files(path)
    if not files:
        raise no_weights(path)
    return files


def _sizes(config: Any) -> Shape:
    """Sizes by axis of a model without a table, as far as the configuration gives them."""
    found = {axis: getattr(config, key, None) for axis, key in _AXES.items()}
    return Shape({axis: size for axis, size in found.items() if isinstance(size, int) and size > 0})


def _counted(config: Any, path: Path) -> int:
    """Parameters of transformers' own model of ``config``, tied ones once; no memory is taken."""
    with torch.device("meta"):
        model: Any = build_model(config)
    model.tie_weights()
    return sum(math.prod(parameter.shape) for parameter in model.parameters())
