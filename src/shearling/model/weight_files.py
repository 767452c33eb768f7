"""Which files of a directory hold the weights that transformers would load."""

from __future__ import annotations

from pathlib import Path

from shearling.errors import ShearlingError
from shearling.files.reading import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LONGEST = 256  # characters of a file's name, where file systems end
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin.index.json")


def weight_files(path: Path) -> list[Path]:
    """The safetensors that are loaded, sorted; none where there are none.

    Others may lie beside them, such as Mistral's consolidated copy of the same weights; they are
    not even looked for where there is neither of the two names.
    """
    if (path / SINGLE).is_file():  # where there are both, transformers reads this one
        return [path / SINGLE]
    if (path / INDEX).is_file():
        return [file for file in indexed_files(path) if file.is_file()]
    return []


def indexed_files(path: Path) -> list[Path]:
    """The files that the index of a directory names, sorted, whether they are there or not.

    Raises:
        ShearlingError: the index names none, or something else than files beside it.
    """
    index = read_json(path / INDEX).get("weight_map")
    if not isinstance(index, dict):
        raise ShearlingError(f"{path / INDEX} has no weight_map; fetch the index again.")
    for name in index.values():
        if not isinstance(name, str) or not 0 < len(name) < LONGEST or Path(name).name != name:
            raise ShearlingError(
                f"{path / INDEX} names {str(name)[:LONGEST]}, which is not a file beside it; "
                "fetch the index again, or the whole checkpoint."
            )
    return [path / name for name in sorted(set(index.values()))]


def no_weights(path: Path) -> ShearlingError:
    """What to say of a directory without weights that can be loaded, and of what it has instead."""
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        return ShearlingError(
            f"{path} holds no safetensors but pickled weights ({pickles[0]}), which can run code "
            "when loaded and are refused; give a safetensors version of the model."
        )
    if "snapshots" in path.parts:  # of the hub's cache
        return ShearlingError(
            f"{path}, fetched from the hub, holds no weights in safetensors; pickled weights "
            "(pytorch_model.bin) can run code when loaded and are not even fetched: give a "
            "repository or a revision with safetensors, or convert them first."
        )
    others = sorted(file.name for file in path.glob("*.safetensors"))
    unread = ""
    if others:
        unread = f" ({others[0]} is not one of these, and transformers does not load it)"
    return ShearlingError(
        f"{path} holds no weights; expected {SINGLE} or {INDEX} with its shards, or a .gguf file"
        f"{unread}."
    )
