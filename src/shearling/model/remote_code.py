"""Code that a model's files name: it is never run, and what cannot do without it is refused.

transformers would ask on the terminal whether to run it, or run it where it was told to.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError, told
from shearling.files.reading import read_json

AUTO_MAP = "auto_map"
CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
# What a configuration says of the machine that it was saved on: which kernels attention and experts
# run on. A name with a slash is fetched from the hub, and is code.
IMPLEMENTATIONS = (
    "attn_implementation", "_attn_implementation", "experts_implementation",
    "_experts_implementation",
)  # fmt: skip
NOT_COPIED = (AUTO_MAP, *IMPLEMENTATIONS)


def check_config(path: Path, raw: Mapping[str, Any]) -> None:
    """Refuse a model that runs only with code that lies beside it or on the hub.

    A model whose type transformers knows is run by transformers' own code, whatever its
    configuration names besides.

    Args:
        path: the model's directory.
        raw: its config.json.

    Raises:
        ShearlingError: it cannot be run without such code.
    """
    for key in IMPLEMENTATIONS:
        if "/" in str(raw.get(key) or ""):
            raise ShearlingError(
                f"{path / CONFIG} names {raw[key]} as {key}, code from the hub that is never run; "
                f"remove {key} from it."
            )
    if not raw.get(AUTO_MAP):
        return
    from transformers import CONFIG_MAPPING

    if raw.get("model_type") not in CONFIG_MAPPING:
        raise ShearlingError(
            f"{path / CONFIG} names {named_class(raw[AUTO_MAP], 'AutoModelForCausalLM')}, code "
            "that is never run, and transformers itself knows no model of the type "
            f"{told(raw.get('model_type'))}; give a model of a type that it knows."
        )


def tokenizer_class(directory: Path) -> str | None:
    """The class that a directory's tokenizer_config.json names as code to run, or None."""
    file = directory / TOKENIZER_CONFIG
    if not file.is_file():
        return None
    found = read_json(file).get(AUTO_MAP)
    return named_class(found, "AutoTokenizer") if found else None


def named_class(auto_map: Any, wanted: str) -> str:
    """The class that an ``auto_map`` names for one of transformers' Auto classes, else its first.

    It may be a table of names or pairs of names (slow and fast), or such a pair alone.
    """
    value = auto_map
    if isinstance(value, Mapping):
        value = value.get(wanted) or next(iter(value.values()), None)
    if isinstance(value, list | tuple):
        value = next((name for name in reversed(value) if name), None)
    return str(value)


def without_code(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without names of code and kernels, never copied; all else as it was."""
    return {key: value for key, value in raw.items() if key not in NOT_COPIED}
