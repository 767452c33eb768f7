"""JSON as others can read it: a number that is none is written as null in a list, and nowhere else.

Python would write NaN and Infinity, which are not JSON.
"""

from __future__ import annotations

import json
import math
from typing import Any

from shearling.errors import ShearlingError


def json_text(value: Any, *, indent: int | None = None, ascii_only: bool = False) -> str:
    """``value`` as JSON; what is not finite in a list becomes null, which is read as NaN.

    Raises:
        ShearlingError: another number is not finite.
    """
    try:
        return json.dumps(value, indent=indent, ensure_ascii=ascii_only, allow_nan=False)
    except ValueError:
        pass  # seldom: only then is everything gone through
    try:
        return json.dumps(_listed(value), indent=indent, ensure_ascii=ascii_only, allow_nan=False)
    except ValueError as error:
        raise ShearlingError(
            f"a result is {_bad(value)}, but a file holds finite numbers; check the model's "
            "weights and the data it was measured on, and run it again."
        ) from error


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [None if _endless(one) else _listed(one) for one in value]
    return value


def _bad(value: Any, name: str = "") -> str:
    """The first number that is not finite, with its name."""
    if isinstance(value, dict):
        found = (_bad(one, f"{name}.{key}" if name else str(key)) for key, one in value.items())
        return next((one for one in found if one), "")
    if isinstance(value, list | tuple):
        found = (_bad(one, name) for one in value if not _endless(one))
        return next((one for one in found if one), "")
    return f"{value} ({name})" if _endless(value) else ""


def _endless(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
