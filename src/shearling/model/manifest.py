"""What every file of ours says of itself, and the lineage that lies beside a model."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Self

from shearling.files.reading import read_json
from shearling.files.results import Misfit, Name, ResultFile, entry, now, refuse
from shearling.model.refs import Identified, ModelRef
from shearling.model.subject import OpenedModel
from shearling.table.axes import units_of
from shearling.version import __version__

MANIFEST = "shearling.json"
LONGEST_LINEAGE = 100  # models; nobody cuts a model more often, and readers walk down the parents


@dataclass(frozen=True)
class SourceFacts:
    """What a manifest says of the model it was made from."""

    name: Name = entry()
    fingerprint: str = entry()
    shape: dict[str, int] = entry("size by axis", absent={})
    parameters: int | None = entry("tied ones once", absent=None)
    bytes: int | None = entry("of the tensors on disk", absent=None)


@dataclass(frozen=True)
class WrittenProof:
    """Logits of what was written against those of what it was made from."""

    identical: bool | None = entry(
        "of a quantised model: whether the directory, loaded again, gave the logits of the model "
        "that was quantised in memory bit for bit",
        absent=None,
        omit=True,
    )
    max_abs_difference: float = entry(
        "from the source with the removed units masked, repaired tensors put back into the "
        "source's geometry; of a quantised model, from the source"
    )
    max_relative_difference: float | None = entry(absent=None)
    divergence: float | None = entry(
        "of a quantised model: of the next-token distributions, in nats", absent=None, omit=True
    )
    tokens: int | None = entry(absent=None)
    loaded_with: Any = entry(absent=None)
    computed_in: str | None = entry(absent=None)
    passed: bool | None = entry(absent=None, omit=True)


@dataclass(frozen=True)
class ModelManifest(ResultFile):
    """How one model was made from another."""

    kind: ClassVar[str] = "manifest"
    written_by: ClassVar[str] = (
        "every stage that makes a model, as `shearling.json` beside `config.json`"
    )

    stage: str = entry("`prune`, `heal`, `learn`, `quantize` or `merge`")
    model: ModelRef = entry()
    source: SourceFacts = entry()
    keep: dict[str, Any] | None = entry(
        "after a cut: surviving indices by axis, in the source's numbering; an axis that was not "
        'cut is absent: `{"layers": [0, 1, 2, 5]}`. An axis whose units every block has for itself '
        "holds one list for each surviving block. Where `options` has `rotation`, `hidden` counts "
        "axes of the rotated stream",
        absent=None,
        omit=True,
    )
    shape: dict[str, int] = entry(
        'size by axis, such as `{"layers": 24, "hidden": 576, "heads": 9, "kv_heads": 3, '
        '"head_dim": 64, "mlp": 1536, "vocab": 49152}`'
    )
    source_shape: dict[str, int] = entry("the same of the source", absent={})
    parameters: int = entry("tied ones once")
    source_parameters: int | None = entry(absent=None)
    source_bytes: int | None = entry("after `quantize`", absent=None, omit=True)
    bytes: int = entry("of the tensors on disk")
    versions: dict[str, Any] = entry(absent={})
    options: dict[str, Any] = entry("of the stage; see below", absent={})
    store: dict[str, Any] | None = entry(
        "after training: fingerprint and domains of its data", absent=None, omit=True
    )
    seed: int | None = entry(absent=None)
    losses: dict[str, dict[str, float]] | None = entry(
        "after training: `before` and `after`, nats a token on held-out text, by domain",
        absent=None,
        omit=True,
    )
    final_weights: dict[str, float] | None = entry(
        "after training: shares of the domains at its end", absent=None, omit=True
    )
    teacher: dict[str, Any] | None = entry(
        "after `heal` with one; with `cache` and `top` where it was kept on disk",
        absent=None,
        omit=True,
    )
    adapter: dict[str, Any] | None = entry(
        "after `merge`: `name`, `type`, `base` and the SHA-256 of its `files`",
        absent=None,
        omit=True,
    )
    probability_lost: dict[str, float] = entry(
        "after `learn`, by axis: the share of the gates' open probability that the cut closes",
        absent={},
        omit=True,
    )
    proof: WrittenProof | None = entry(absent=None, omit=True)
    repaired: tuple[str, ...] = entry(
        "names of the tensors that were solved anew", absent=(), omit=True
    )
    files: dict[str, str] = entry("SHA-256 of each file of weights, by name", absent={})
    seconds: float | None = entry(absent=None)
    parent: dict[str, Any] | None = entry("the source's own manifest, or null", absent=None)

    def __post_init__(self) -> None:
        """Refuse indices that the source does not have, and a block too many or too few."""
        sizes = self.source.shape or self.source_shape
        if self.layers is not None and not isinstance(self.layers, list | tuple):
            raise Misfit("keep.layers", "a list", self.layers)
        blocks = len(self.layers) if self.layers is not None else sizes.get("layers")
        for axis, kept in (self.keep or {}).items():
            if not isinstance(kept, list | tuple):
                raise Misfit(f"keep.{axis}", "a list", kept)
            if not any(isinstance(one, list | tuple) for one in kept):
                _check_indices(f"keep.{axis}", kept, sizes.get(axis))
                continue
            if len(kept) != blocks:
                raise Misfit(f"keep.{axis}", f"a list for each of {blocks} blocks", kept)
            for number, one in enumerate(kept):
                _check_indices(f"keep.{axis}[{number}]", one, units_of(axis, sizes))

    @property
    def layers(self) -> list[int] | None:
        """The source's blocks that are left; None where all are, or no cut is spoken of."""
        return (self.keep or {}).get("layers")

    def to_json(self) -> dict[str, Any]:
        """The file's content, ``kind`` and ``stage`` first."""
        return {"kind": self.kind, "stage": self.stage} | super().to_json()

    @classmethod
    def load(cls, directory: Path) -> Self | None:
        """The manifest of a model directory, and of all it was made from; None where there is none.

        Raises:
            ShearlingError: the file is damaged; it names the field.
        """
        file = directory / MANIFEST
        return cls.from_json(read_json(file), file) if file.is_file() else None

    def lineage(self, path: Path) -> Iterator[ModelManifest]:
        """This manifest and those of what the model was made from, the newest first.

        Raises:
            ShearlingError: one of the parents is damaged, or there are too many; ``path`` is named.
        """
        manifest, inside = self, ""
        for _ in range(LONGEST_LINEAGE):
            yield manifest
            if manifest.parent is None:
                return
            inside += "parent."
            manifest = ModelManifest.from_json(manifest.parent, path, inside)
        refuse(path, "parent", f"a lineage of at most {LONGEST_LINEAGE} models", manifest.parent)


def _check_indices(where: str, kept: Any, size: int | None) -> None:
    """Raise Misfit unless these are indices that an axis of the source has."""
    if not isinstance(kept, list | tuple):
        raise Misfit(where, "a list of indices", kept)
    if not all(type(one) is int for one in kept):
        raise Misfit(where, "whole numbers", kept)
    if not all(0 <= index < (size or 0) for index in kept):
        raise Misfit(where, f"indices below the source's size of {size or 'unknown'}", kept)


def stamp(checkpoint: OpenedModel | None = None) -> dict[str, Any]:
    """The fields that all files share; ``model`` if one is meant."""
    fields: dict[str, Any] = {
        "shearling": __version__,
        "created": now(),
    }
    return fields if checkpoint is None else fields | {"model": identity(checkpoint)}


def identity(checkpoint: OpenedModel) -> dict[str, str]:
    """A model's name and fingerprint."""
    return {"name": checkpoint.name, "fingerprint": checkpoint.fingerprint}


def ref(checkpoint: Identified) -> ModelRef:
    """A model's name and fingerprint, as a result says them."""
    return ModelRef(checkpoint.name, checkpoint.fingerprint)


def describe(checkpoint: OpenedModel) -> dict[str, Any]:
    """Identity and size of a model."""
    return identity(checkpoint) | {
        "shape": dict(checkpoint.shape),
        "parameters": checkpoint.parameters,
        "bytes": checkpoint.bytes,
    }


def versions() -> dict[str, str]:
    """Versions that can change a figure."""
    names = ("torch", "transformers", "tokenizers", "safetensors")
    return {"python": platform.python_version()} | {name: _installed(name) for name in names}


@cache
def _installed(package: str) -> str:
    """Its version, looked up once: that reads through the package's files on disk."""
    return version(package)


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a model directory as it stands in its file, or None where there is none.

    Raises:
        ShearlingError: it is damaged, or one of those inside it; the field is named.
    """
    file = directory / MANIFEST
    if not file.is_file():
        return None
    values = read_json(file)
    for _ in ModelManifest.from_json(values, file).lineage(file):
        pass
    return values


def made_from(checkpoint: OpenedModel) -> dict[str, Any]:
    """What every manifest says of the model that another is made from, by field."""
    return {
        "source": SourceFacts(**describe(checkpoint)),
        "source_shape": dict(checkpoint.shape),
        "source_parameters": checkpoint.parameters,
        "versions": versions(),
        "parent": read_manifest(checkpoint.path),
    }


def made_of(written: OpenedModel, name: str) -> dict[str, Any]:
    """What every manifest says of the model it lies beside, by field."""
    return {
        "model": ModelRef(name, written.fingerprint),
        "shape": dict(written.shape),
        "parameters": written.parameters,
        "bytes": written.bytes,
    }
