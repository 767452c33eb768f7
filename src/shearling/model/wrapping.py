"""A language model inside a larger one on disk: its configuration, its names, and all else.

Everything but reading and writing sees the language model alone, as if it stood by itself. What is
not of it is copied byte for byte into whatever is made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from shearling.errors import ShearlingError, in_words
from shearling.files.reading import read_json
from shearling.files.scratch import scratch
from shearling.files.writer import write_json
from shearling.model.naming import gathered
from shearling.model.stored import StoredTensor
from shearling.table.families import Home
from shearling.table.families.wrappers import STYLES, Wrapper, wrapper_of

TEXT = "text_config"
Load = Callable[[list[str]], dict[str, Tensor]]


@dataclass(frozen=True)
class Wrapping:
    """What lies around a language model.

    Attributes:
        kind: what is known of its architecture.
        raw: config.json as it is written.
        text: the language model's own configuration, every key written out, as :attr:`kind` has it
            stand alone.
        prefixes: beginnings of tensor names in the language model -> on disk.
        others: tensors that are not the language model's, by their names on disk.
        turned: names on disk of what holds experts' matrices inputs first, where models have
            outputs first.
        aliases: keys of its configuration -> what transformers calls these.
    """

    kind: Wrapper
    raw: Mapping[str, Any]
    text: Mapping[str, Any]
    prefixes: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, StoredTensor] = field(default_factory=dict)
    turned: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)

    def on_disk(self, name: str) -> str:
        """What a tensor of the language model is called on disk."""
        return _renamed(name, self.prefixes) or name

    def inside(self, stored: str) -> str | None:
        """What a stored tensor is called in the language model; None where it is not of it."""
        return _renamed(stored, {disk: own for own, disk in self.prefixes.items()})

    def as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter of the language model the way round in which the source has it on disk."""
        stacked = name.endswith(tuple(self.stacks))
        if self.turned and stacked and tensor.shape[-1] != tensor.shape[-2]:
            return tensor.mT.contiguous()
        return tensor

    @cached_property
    def stacks(self) -> Mapping[str, tuple[int, int]]:
        """What is stored for all experts of a block at once, if anything is; see ``kind``."""
        return self.kind.stacks(self.text)

    def config(self, text: Mapping[str, Any]) -> dict[str, Any]:
        """The whole config.json around a language model of another configuration.

        Only what differs is written, and what transformers would conclude wrongly from that: all
        else stays as it was, whatever the defaults.
        """
        changed = {key: value for key, value in text.items() if self.text.get(key) != value}
        concluded = _resolved(self.kind, self._with(changed))
        concluded["tie_word_embeddings"] = text["tie_word_embeddings"]  # the tensors say so
        wrong = {key for key in text.keys() & concluded if concluded[key] != text[key]}
        return self._with(changed | {key: text[key] for key in wrong})

    def _with(self, changed: Mapping[str, Any]) -> dict[str, Any]:
        """config.json with some other keys of the language model, wherever it has these."""
        nested = isinstance(self.raw.get(TEXT), Mapping)
        before = self.raw[TEXT] if nested else self.raw
        spelled = {self.aliases.get(key, key): key for key in before}
        after = {**before, **{spelled.get(key, key): changed[key] for key in changed}}
        return {**self.raw, TEXT: after} if nested else after

    @cached_property
    def bytes(self) -> int:
        """Of what is not the language model's."""
        return sum(tensor.bytes for tensor in self.others.values())


def around(
    wrapping: Wrapping | None, homes: Mapping[str, Home], sizes: Mapping[str, int], load: Load
) -> tuple[Mapping[str, int], Load]:
    """Bytes by name on disk of all that is to be written, and what gives tensors by these.

    Args:
        wrapping: what lies around the language model; None where it stands alone.
        homes: where transformers' model holds the language model's tensors.
        sizes: bytes of these, in the order in which they are stored.
        load: gives some of these by name.
    """
    if wrapping is None:
        return sizes, load
    if not wrapping.stacks:
        homes = {name: Home(name) for name in sizes}
    own: dict[str, list[str]] = {}
    for name in sizes:
        own.setdefault(homes[name].parameter, []).append(name)
    inside = {wrapping.on_disk(parameter): parameter for parameter in own}
    others, as_stored = wrapping.others, wrapping.as_stored
    whole = {disk: sum(sizes[name] for name in own[inner]) for disk, inner in inside.items()}
    whole |= {name: tensor.bytes for name, tensor in others.items()}

    def load_all(names: list[str]) -> dict[str, Tensor]:
        parts = load([part for name in names if name in inside for part in own[inside[name]]])
        inner = gathered(((name, parts.pop(name)) for name in list(parts)), homes)
        return {
            name: as_stored(inside[name], inner.pop(inside[name]))
            if name in inside
            else _read(others[name], name)
            for name in names
        }

    return whole, load_all


def wrapping_of(path: Path, headers: Mapping[str, StoredTensor] | None = None) -> Wrapping | None:
    """What lies around the language model in a directory; None where it stands alone.

    Args:
        path: the directory.
        headers: what is stored in it; names are not looked at if not given.

    Raises:
        ShearlingError: an architecture that is not known, a configuration that transformers
            refuses, or no language model among the tensors.
    """
    from shearling.model.loading import load_config

    raw = read_json(path / "config.json")
    kind = wrapper_of(raw, str(path))
    if kind is None:
        return None
    config = load_config(path)
    text = _text_of(kind, config)
    # Both places are in use, and the outer one counts; a head that is stored is a head.
    tied = bool(config.tie_word_embeddings or text.get("tie_word_embeddings"))
    bare = Wrapping(
        kind, raw, text | {"tie_word_embeddings": tied},
        aliases=config.get_text_config().attribute_map,
    )  # fmt: skip
    return bare if headers is None else _named(bare, headers, path)


def _resolved(kind: Wrapper, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's configuration as transformers reads it from a config.json."""
    from shearling.model.loading import load_config

    with scratch() as directory:
        write_json(directory / "config.json", raw)
        return _text_of(kind, load_config(directory))


def _text_of(kind: Wrapper, config: Any) -> dict[str, Any]:
    return kind.plain(config.get_text_config().to_dict())


def plain_config(text: Mapping[str, Any], path: Path) -> Any:
    """transformers' configuration of a language model that stands alone."""
    from transformers import AutoConfig

    with in_words(
        lambda why: f"the {TEXT} of {path / 'config.json'} is refused by transformers: {why}."
    ):
        config = AutoConfig.for_model(**text)
        config.name_or_path = str(path)
    return config


def _named(bare: Wrapping, headers: Mapping[str, StoredTensor], path: Path) -> Wrapping:
    """The same with the names that are in use in a directory."""
    for style in STYLES:
        if any(name.startswith(f"{style['model.']}layers.0.") for name in headers):
            break
    else:
        raise ShearlingError(
            f"{path} is of the architecture {bare.kind.model_type}, but holds no language model "
            f"({STYLES[0]['model.']}layers or {STYLES[1]['model.']}layers were looked for); give "
            "the whole checkpoint."
        )
    named = replace(bare, prefixes=style)
    others = {name: tensor for name, tensor in headers.items() if named.inside(name) is None}
    stored = named.on_disk("lm_head.weight") in headers
    text = {**bare.text, "tie_word_embeddings": bare.text["tie_word_embeddings"] and not stored}
    turned = frozenset(
        name for name, stored in headers.items() if bare.kind.inputs_first(text, name, stored.shape)
    )
    return replace(named, text=text, others=others, turned=turned)


def _renamed(name: str, prefixes: Mapping[str, str]) -> str | None:
    for before, after in prefixes.items():
        if name.startswith(before):
            return after + name.removeprefix(before)
    return None


def _read(tensor: StoredTensor, name: str) -> Tensor:
    with safe_open(tensor.file, "pt") as shard:
        return shard.get_tensor(name)


def disk_names(wrapping: Wrapping | None, names: Iterable[str]) -> dict[str, str]:
    """Name in the language model -> on disk."""
    return {name: name if wrapping is None else wrapping.on_disk(name) for name in names}
