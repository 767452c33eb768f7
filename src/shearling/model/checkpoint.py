"""One lazy handle on a pretrained model: a local directory, a hub id or a GGUF file.

Opening reads the configuration and the shards' headers, and proves that the tensors on disk are
those the family's table expects, before anything else is done. Tensors are read by name. A model
directory is never written to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from shearling.errors import ShearlingError, in_words
from shearling.files.reading import read_json
from shearling.model.dtypes import torch_dtype
from shearling.model.fingerprint import fingerprint
from shearling.model.head import is_plain
from shearling.model.loading import load_config, load_tokenizer
from shearling.model.naming import unstacked
from shearling.model.remote_code import check_config
from shearling.model.sanity import check_numbers
from shearling.model.stored import StoredTensor, stored_tensors
from shearling.model.tensors import StoredTensors, Tensors
from shearling.model.weight_files import INDEX, SINGLE, indexed_files, no_weights
from shearling.model.wrapping import Wrapping, plain_config, wrapping_of
from shearling.table.families import FAMILIES, Family, Home, family_of, refuse
from shearling.table.families.wrappers import wrapper_of
from shearling.table.layout import Layout
from shearling.table.values import Shape

# What turns weights back that were published quantised and never otherwise: gpt-oss, DeepSeek V3.
DEQUANTISING = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}


@dataclass(frozen=True)
class Checkpoint:
    """A model, opened and checked: facts, and weights that are read when they are asked for.

    Attributes:
        path: the directory; of what is made of another model, that model's.
        raw: config.json as it is written; of a wrapped language model, what its own would be.
        config: the same, resolved by transformers.
        family: the architecture.
        layout: which tensors it has, and on which axes they lie.
        shape: its size by axis.
        dtypes: tensor name -> safetensors' name of its type, such as ``BF16``.
        tensors: the weights.
        source: the model that this one is made of as it is read, whose name, fingerprint,
            tokenizer and side files it has; None for a model on disk.
        wrapping: what lies around a language model that is part of a larger one; None for others.
        ahead: how many tensors lie beside the model that predict tokens further ahead; they are
            never copied.
    """

    path: Path
    raw: Mapping[str, Any]
    config: Any
    family: Family
    layout: Layout
    shape: Shape
    dtypes: Mapping[str, str]
    tensors: Tensors
    source: Checkpoint | None = None
    wrapping: Wrapping | None = None
    ahead: int = 0

    @staticmethod
    def open(model: str | Path, *, merge_adapter: bool = False) -> Checkpoint:
        """Open ``model`` and check it against its family's table.

        Args:
            model: a directory with config.json and safetensors, a ``.gguf`` file (converted once,
                into the cache), or a hub id such as ``HuggingFaceTB/SmolLM2-135M``.
            merge_adapter: whether an adapter in the directory is merged (once, into the cache).

        Raises:
            ShearlingError: nothing there, an adapter that is not to be merged, an unknown
                architecture, pickled weights, a shard that is absent, truncated or corrupt, a
                tensor that is missing, of the wrong shape or unknown.
        """
        from shearling.model.resolve import resolve

        path = resolve(model, merge_adapter=merge_adapter)
        raw = read_json(path / "config.json")
        refuse(raw.get("model_type"), str(model))
        check_config(path, raw)
        _require_plain(raw, model)
        alone = str(raw.get("model_type")) in FAMILIES
        if not alone and wrapper_of(raw, str(model)) is not None:
            return _unwrapped(path, model)
        family = family_of(raw.get("model_type"), str(model))
        config = load_config(path)
        layout, shape = table_of(family, config, path)
        headers = stored_tensors(path, _shards(path))
        ahead = ahead_of(family, headers, shape["layers"])
        headers, homes = unstacked(headers, layout, shape, family)
        files, dtypes = _match(layout, shape, headers, family, path)
        _check_tied(layout, headers, path)
        tensors = StoredTensors(
            files, {name: home.parameter for name, home in homes.items()}, homes
        )
        return Checkpoint(
            path, raw, config, family, layout, shape, dtypes, tensors, ahead=len(ahead)
        )  # fmt: skip

    @property
    def name(self) -> str:
        """The directory's name, or the hub's when the directory is a snapshot of it."""
        return directory_name(self.path)

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of every tensor on disk."""
        shapes = self.layout.tensors(self.shape)
        return {
            name: math.prod(shapes[name]) * torch_dtype(dtype).itemsize
            for name, dtype in self.dtypes.items()
        }

    @property
    def bytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(self.sizes.values())

    @property
    def parameters(self) -> int:
        """Parameters, tied ones once."""
        return self.layout.count(self.shape)

    @property
    def plain_head(self) -> bool:
        """Whether logits are the head's product and no more: neither scaled nor soft-capped."""
        return is_plain(self.config)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(name, tensor)`` of every name, in an order that suits where they lie.

        Tensors may be views of mapped files: reading costs nothing until they are touched, and
        their memory goes when they do, provided the iteration has moved to its end.
        """
        return self.tensors.read(names)

    @property
    def files(self) -> Mapping[str, Path]:
        """Tensor name -> shard that holds it, of a model whose weights lie on disk as they are."""
        assert isinstance(self.tensors, StoredTensors), "the weights are made as they are read"
        return self.tensors.files

    def block_homes(self, block: int) -> dict[str, Home]:
        """Tensor name -> where the module of block ``block`` holds it."""
        prefix = f"{self.family.blocks}.{block}."
        return {
            name: replace(home, parameter=home.parameter.removeprefix(prefix))
            for row in self.layout.block_rows(block)
            for name, home in self.family.homes(row, block, self.shape).items()
        }

    @cached_property
    def homes(self) -> dict[str, Home]:
        """Tensor name -> where transformers' model holds it."""
        return {
            name: home
            for row, block in dict.fromkeys(self.layout.places(self.shape).values())
            if not row.bare
            for name, home in self.family.homes(row, block, self.shape).items()
        }

    def outer_names(self) -> list[str]:
        """Names of the tensors outside the blocks."""
        return [row.name for row in self.layout.stored if not row.in_block]

    @cached_property
    def fingerprint(self) -> str:
        """Another for any other byte in a tensor; see ``shearling.model.fingerprint``."""
        if self.source is not None:  # this is no model that anybody has
            return self.source.fingerprint
        assert isinstance(self.tensors, StoredTensors), "what is made of others has their name"
        stored = self.tensors.stored
        files = {stored.get(name, name): file for name, file in self.files.items()}
        if self.wrapping is None:
            return fingerprint(self.raw, files)
        others = {name: tensor.file for name, tensor in self.wrapping.others.items()}
        return fingerprint(self.wrapping.raw, files | others)

    def notes(self, after: Shape) -> list[str]:
        """Sentences on what writing a cut to ``after`` entails that a user would not expect."""
        remarks = self.family.remarks(self.config, after)
        if not self.ahead:
            return remarks
        return [
            f"the {self.ahead} tensors that predict tokens further ahead are not copied: they were "
            "trained on what the whole model gives.",
            *remarks,
        ]

    def tokenizer(self) -> Any:
        """The tokenizer that lies beside the weights."""
        return load_tokenizer(self.path)


def _unwrapped(path: Path, model: str | Path) -> Checkpoint:
    """The language model inside a larger one."""
    headers = stored_tensors(path, _shards(path))
    wrapping = wrapping_of(path, headers)
    assert wrapping is not None
    where = f"the language model inside {model}, a {wrapping.kind.model_type},"
    family = wrapping.kind.within(family_of(wrapping.text.get("model_type"), where))
    config = plain_config(wrapping.text, path)
    layout, shape = table_of(family, config, path)
    own = {
        inner: header.turned if name in wrapping.turned else header
        for name, header in headers.items()
        if (inner := wrapping.inside(name)) is not None
    }
    own, homes = unstacked(own, layout, shape, family)
    files, dtypes = _match(layout, shape, own, family, path)
    inside = {name: homes[name].parameter if name in homes else name for name in files}
    stored = {name: wrapping.on_disk(inner) for name, inner in inside.items()}
    tensors = StoredTensors(files, stored, homes, wrapping.turned)
    ahead = ahead_of(family, wrapping.others, shape["layers"])
    others = {name: tensor for name, tensor in wrapping.others.items() if name not in ahead}
    return Checkpoint(
        path, dict(wrapping.text), config, family, layout, shape, dtypes, tensors,
        wrapping=replace(wrapping, others=others), ahead=len(ahead),
    )  # fmt: skip


def directory_name(path: Path) -> str:
    """A model directory's name, or the hub's when the directory is a snapshot of it."""
    parts = path.resolve().parts
    hub = [part for part in parts if part.startswith("models--")]
    return hub[-1].rsplit("--", 1)[-1] if hub else parts[-1]


def table_of(family: Family, config: Any, path: Path) -> tuple[Layout, Shape]:
    """The table of a model and its sizes.

    Raises:
        ShearlingError: the configuration of ``path`` gives sizes that cannot be.
    """
    with in_words(
        lambda why: (
            f"{path / 'config.json'} gives sizes that a {family.model_type} model cannot "
            f"have ({why}); repair the configuration first."
        )
    ):
        layout, shape = family.layout(config), family.shape(config)
        for axis, size in shape.items():
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"{axis} is {size!r}, and not a whole number")
        layout.check(shape)
    return layout, shape


def _shards(path: Path) -> list[Path]:
    """The weight files of a directory, all of them present."""
    if (path / SINGLE).is_file():  # where there are both, transformers reads this one
        return [path / SINGLE]
    if (path / INDEX).exists():
        files = indexed_files(path)
        absent = next((file.name for file in files if not file.is_file()), None)
        if absent is not None:
            raise ShearlingError(
                f"{path / INDEX} names {absent}, which is not a file beside it; "
                "fetch the missing shard, or the whole checkpoint again."
            )
        return files
    raise no_weights(path)


def _require_plain(raw: Mapping[str, Any], model: str | Path) -> None:
    """Raise ShearlingError if the weights are quantised: they can be measured, and not cut."""
    how = raw.get("quantization_config")
    method = how.get("quant_method") if isinstance(how, Mapping) else None
    if method in DEQUANTISING:
        raise ShearlingError(
            f"{model} is quantised (by {method}), and shearling cuts and trains unquantised "
            "weights; load it in transformers with "
            f"quantization_config={DEQUANTISING[method]}(dequantize=True), save it, and give that."
        )
    if isinstance(how, Mapping):
        raise ShearlingError(
            f"{model} is quantised (by {how.get('quant_method', 'some method')}), and shearling "
            "cuts and trains unquantised weights; give the checkpoint that it was made from."
        )


def _match(
    layout: Layout,
    shape: Shape,
    headers: Mapping[str, StoredTensor],
    family: Family,
    path: Path,
) -> tuple[dict[str, Path], dict[str, str]]:
    """Prove that what is stored is what the table expects, one for one."""
    expected = layout.tensors(shape)
    for name, sizes in expected.items():
        if name not in headers:
            _check_prefix(name, headers, family, path)
            raise ShearlingError(
                f"{path} lacks the tensor {name}, which its config.json calls for; "
                "fetch the checkpoint again, or repair the configuration."
            )
        if headers[name].shape != sizes:
            raise ShearlingError(
                f"{path} stores {name} as {list(headers[name].shape)}, but its config.json "
                f"calls for {list(sizes)}; one of the two is wrong."
            )
        torch_dtype(headers[name].dtype)
    tied = {row.name for row in layout.rows if row.tied_to}
    ahead = set(ahead_of(family, headers, shape["layers"]))
    unknown = [
        name
        for name in headers
        if name not in expected
        and name not in tied
        and not name.endswith(family.ignored)
        and name not in ahead
    ]
    if unknown:
        raise ShearlingError(
            f"{path} holds {len(unknown)} tensors that a {family.model_type} model does not have, "
            f"such as {unknown[0]}; give a plain causal language model, adapters merged."
        )
    return (
        {name: headers[name].file for name in expected},
        {name: headers[name].dtype for name in expected},
    )


def ahead_of(family: Family, names: Iterable[str], depth: int) -> list[str]:
    """The names of tensors that lie beside or behind the blocks and predict further ahead."""
    return [
        name
        for name in names
        if (family.predictors and name.startswith(family.predictors))
        or (family.predicting and _is_behind(name, family, depth))
    ]


def _is_behind(name: str, family: Family, depth: int) -> bool:
    """Whether a tensor belongs to a block behind the last."""
    before, found, rest = name.partition(f"{family.blocks}.")
    number = rest.partition(".")[0]
    return bool(found) and not before and number.isdecimal() and int(number) >= depth


def _check_prefix(name: str, headers: Iterable[str], family: Family, path: Path) -> None:
    """Refuse names that differ from the table's by what stands before the blocks' list."""
    lists = family.blocks.rpartition(".")[2]
    tail = f"{lists}.0."
    stored = next((one for one in headers if one.startswith(tail) or f".{tail}" in one), None)
    if stored is None or stored.startswith(f"{family.blocks}."):
        return
    given = stored[: -len(stored.partition(tail)[2]) - len(tail)]
    raise ShearlingError(
        f"{path} names its tensors as a base model or a multimodal wrapper does: {stored} begins "
        f"with {given!r} where {family.blocks.removesuffix(lists)!r} was expected ({name} is one "
        "of those it lacks); load it with transformers' AutoModelForCausalLM, save_pretrained that "
        "model, and give its directory."
    )


def _check_tied(layout: Layout, headers: Mapping[str, StoredTensor], path: Path) -> None:
    """Prove that a tied tensor which is stored all the same is the one it is tied to.

    transformers does not tie the two when their values differ, whatever the configuration says.
    """
    for row in layout.rows:
        if row.tied_to is None or row.name not in headers:
            continue
        tensors = []
        for name in (row.name, row.tied_to):
            with safe_open(headers[name].file, "pt") as shard:
                tensors.append(shard.get_tensor(name))
            check_numbers(name, tensors[-1], headers[name].file)
        if not torch.equal(*tensors):
            raise ShearlingError(
                f"{path} stores {row.name} with other values than {row.tied_to}, but its "
                "config.json ties the two; set tie_word_embeddings to false there, or remove "
                f"{row.name}."
            )
