"""JSON and YAML read, or one sentence on what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

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


class _Loader(yaml.SafeLoader):
    """Plain values alone, and few references: nested ones stand for more than memory holds."""

    most_aliases = 20

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Count references as they come."""
        if self.check_event(yaml.AliasEvent):
            self.most_aliases -= 1
            if self.most_aliases < 0:
                mark = self.peek_event().start_mark
                raise ComposerError(None, None, "there are too many aliases", mark)
        return super().compose_node(parent, index)


def parse_yaml(text: str, what: str) -> Any:
    """The plain value that a YAML text stands for.

    Args:
        text: the YAML.
        what: how to name it, as the beginning of a sentence.

    Raises:
        ShearlingError: it is none, or is nested too deeply.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise ShearlingError(f"{what} is not YAML{line}: {problem}.") from error
    except RecursionError as error:
        raise ShearlingError(f"{what} is not YAML: it is nested too deeply.") from error
    except (ValueError, OverflowError, TypeError) as error:  # a date or a number that is none
        raise ShearlingError(f"{what} is not YAML: {error}.") from error
