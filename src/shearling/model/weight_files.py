"""Which files of a directory hold the weights that transformers would load."""

from __future__ import annotations

from pathlib import Path

from shearling.files.reading import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(path: Path) -> list[Path]:
    """The safetensors that are loaded, sorted; none where there are none.

    Others may lie beside them, such as Mistral's consolidated copy of the same weights.
    """
    if (path / SINGLE).is_file():  # where there are both, transformers reads this one
        return [path / SINGLE]
    if (path / INDEX).is_file():
        index = read_json(path / INDEX).get("weight_map")
        if isinstance(index, dict):
            named = {path / str(name) for name in index.values()}
            return sorted(file for file in named if file.is_file())
    return sorted(path.glob("*.safetensors"))
