"""JSON files read, or one sentence on what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ShearlingError: it cannot be read, is no JSON, or holds something else than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
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
