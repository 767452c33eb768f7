"""Which files of a directory hold the weights that transformers would load."""

from __future__ import annotations

from pathlib import Path

from shearling.errors import ShearlingError
from shearling.files.reading import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin.index.json")


def weight_files(path: Path) -> list[Path]:
    """The safetensors that are loaded, sorted; none where there are none.

    Others may lie beside them, such as Mistral's consolidated copy of the same weights; they are
    not even looked for where there is neither of the two names.
    """
    if (path / SINGLE).is_file():  # where there are both, transformers reads this one
        return [path / SINGLE]
    if (path / INDEX).is_file():
        index = read_json(path / INDEX).get("weight_map")
        if isinstance(index, dict):
            named = {path / str(name) for name in index.values()}
            return sorted(file for file in named if file.is_file())
    return []


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
