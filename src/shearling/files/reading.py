"""JSON and YAML read safely, in this one place, or one sentence on what is wrong with them.

Whatever a file holds (bytes that are no text, a number of thousands of digits, brackets that never
end) becomes a sentence. What the values mean is up to the models of the files
(:mod:`shearling.files.results`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from shearling.errors import ShearlingError

LARGEST = 256 * 2**20  # bytes; the largest we know is a tokenizer of 50 MB
AGAIN = "fetch or write it again"


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
            f"are read; {AGAIN}."
        )


def parse_json(text: str | bytes, where: object, advice: str = AGAIN) -> Any:
    """The value that a text holds.

    Args:
        text: of a file, or of a line of it; bytes are UTF-8.
        where: what to call it, such as the file.
        advice: what would work instead, the end of a sentence.

    Raises:
        ShearlingError: it is no UTF-8, no JSON, or nested too deeply.
    """
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except RecursionError as error:
        raise ShearlingError(f"{where} is nested too deeply to be read; {advice}.") from error
    except UnicodeDecodeError as error:
        raise ShearlingError(
            f"{where} is not valid JSON (it is no UTF-8 text: {error.reason} at byte "
            f"{error.start}); {advice}."
        ) from error
    except ValueError as error:  # also of a number of thousands of digits
        raise ShearlingError(f"{where} is not valid JSON ({error}); {advice}.") from error


def read_bytes(path: Path, advice: str = AGAIN) -> bytes:
    """What a file holds.

    Raises:
        ShearlingError: it is no regular file, too large, or cannot be read.
    """
    try:
        check_size(path)
        return path.read_bytes()
    except OSError as error:
        if path.name == "config.json":  # a directory was given that is no model's
            advice = "a model directory holds config.json and safetensors"
        raise ShearlingError(f"{path} cannot be read ({error.strerror}); {advice}.") from error


def read_json(path: Path, advice: str = AGAIN) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ShearlingError: it cannot be read, is too large or too deep, is no JSON, or holds something
            else than an object.
    """
    value = parse_json(read_bytes(path, advice), path, advice)
    if not isinstance(value, dict):
        raise ShearlingError(
            f"{path} holds a {type(value).__name__}, but an object was expected; {advice}."
        )
    return value


def json_object(text: str | bytes, where: object, advice: str = AGAIN) -> dict[str, Any]:
    """The object that a text holds.

    Raises:
        ShearlingError: it is no JSON, or something else than an object.
    """
    value = parse_json(text, where, advice)
    if not isinstance(value, dict):
        raise ShearlingError(f"{where} is a {type(value).__name__}, not an object; {advice}.")
    return value


class _Loader(yaml.SafeLoader):
    """Plain values alone, and few references: nested ones stand for more than memory holds."""

    most_aliases, most_levels = 20, 100

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Count references and levels as they come."""
        if self.check_event(yaml.AliasEvent):
            self.most_aliases -= 1
            if self.most_aliases < 0:
                mark = self.peek_event().start_mark
                raise ComposerError(None, None, "there are too many aliases", mark)
        self.most_levels -= 1
        if self.most_levels < 0:
            mark = self.peek_event().start_mark
            raise ComposerError(None, None, "it is nested too deeply", mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self.most_levels += 1


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
