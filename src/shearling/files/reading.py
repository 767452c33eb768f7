"""JSON files read, or one sentence on what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError

LARGEST = 256 * 2**20  # bytes; the largest we know is a tokenizer of 50 MB


def check_size(path: Path, most: int = LARGEST) -> None:
    """Refuse a file that is no regular one, or too large to be parsed in memory.

    Raises:
        ShearlingError: it is a pipe or a device, or has more than ``most`` bytes.
    """
    if path.exists() and not path.is_file():
        raise ShearlingError(f"{path} is not a regular file; give one that can be read whole.")
    if path.is_file() and path.stat().st_size > most:
        raise ShearlingError(
            f"{path} has {path.stat().st_size / 1e6:,.0f} MB, but at most {most / 1e6:,.0f} MB "
            "are read; fetch or write it again."
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ShearlingError: it cannot be read, is too large or too deep, is no JSON, or holds something
            else than an object.
    """
    check_size(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ShearlingError(
            f"{path} is nested too deeply to be read; fetch or write it again."
        ) from error
    except ValueError as error:  # also of a number of thousands of digits
        raise ShearlingError(
            f"{path} is not valid JSON ({error}); fetch or write it again."
        ) from error
    except OSError as error:
        raise ShearlingError(
            f"{path} cannot be read ({error.strerror}); a model directory holds config.json "
            "and safetensors."
        ) from error
    if not isinstance(value, dict):
        raise ShearlingError(f"{path} holds a {type(value).__name__}, but an object was expected.")
    return value
