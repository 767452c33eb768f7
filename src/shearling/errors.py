"""The one exception that users meet, and the border at which others are turned into it."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

LONGEST = 400  # characters of a reason that a sentence shows
WORD = 500  # characters of a word: a reason's, and what stands around it
SENTENCE, ENDING = 1200, 300  # characters of a sentence, and of its end where it is longer
_LONG_WORD = re.compile(rf"\S{{{WORD + 1},}}")
# What these say is a key, a name or nothing; a reader needs their kind as well.
_TERSE = (LookupError, AttributeError, TypeError, AssertionError, ArithmeticError, RecursionError)
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate")


class ShearlingError(ValueError):
    """Something the user gave cannot work.

    The message is one sentence that names what was given, what was expected and what would
    work; the command line prints it without a traceback and exits with 2. A damaged file may hold
    a name of any length: words of more than 500 characters are shown by their beginning, and of
    more than 1,200 characters in all the middle is left out.
    """

    def __init__(self, message: str) -> None:
        """Take the sentence."""
        said = _LONG_WORD.sub(lambda word: f"{word[0][: WORD - 1]}…", message)
        if len(said) > SENTENCE:
            said = f"{said[: SENTENCE - ENDING - 3]} … {said[-ENDING:]}"
        super().__init__(said)


def reason(error: BaseException) -> str:
    """What an error says, all of its lines as one, without a full stop.

    Validators say on the second line what is wrong, and on the first only who complains.
    """
    said, kind = " ".join(str(error).split()).rstrip(".:; "), type(error).__name__
    if not said:
        return kind
    return shortened(f"{kind}: {said}" if isinstance(error, _TERSE) else said)


def shortened(said: str) -> str:
    """A reason as a sentence shows it: what a file holds may be of any length."""
    return said if len(said) <= LONGEST else said[: LONGEST - 3] + "..."


def told(value: object) -> str:
    """A value that a file holds, as a sentence shows it."""
    return shortened(repr(value))


def nearest(given: str, known: Iterable[str]) -> str:
    """``"; the nearest is mlp"`` where a name that is not known is like one that is, else ""."""
    close = get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f"; the nearest is {close[0]}" if close else ""


# What pydantic calls a mistake: by the first word of its name, and by the whole of it.
_KINDS = {
    "int": "a whole number", "float": "a number", "finite": "a finite number",
    "bool": "true or false", "string": "a text", "list": "a list", "tuple": "a list",
    "dict": "keys with values", "literal": "{expected}",
    "greater_than_equal": "at least {ge}", "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}", "less_than": "less than {lt}",
}  # fmt: skip


def misfit(mistake: Mapping[str, Any], given: str | None = None) -> str:
    """What pydantic finds wrong: ``2.5 was given, but a whole number was expected``.

    Args:
        mistake: one of a ValidationError's errors.
        given: what was given, in words; by default the value.
    """
    kind, facts = (
        mistake["type"],
        {
            name: int(bound) if isinstance(bound, float) and bound.is_integer() else bound
            for name, bound in (mistake.get("ctx") or {}).items()
        },
    )
    wanted = _KINDS.get(kind, _KINDS.get(kind.partition("_")[0]))
    if kind == "value_error" or wanted is None:
        said = mistake["msg"].removeprefix("Value error, ").rstrip(".")
        return said if given is None else f"{given} was given, but {said[:1].lower()}{said[1:]}"
    value = told(mistake["input"]) if given is None else given
    return f"{value} was given, but {wanted.format(**facts)} was expected"


def count_of(number: int, noun: str) -> str:
    """1, "block" -> "1 block"; 6, "block" -> "6 blocks"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def lacks_memory(error: BaseException) -> bool:
    """Whether an error, torch's RuntimeError among them, means that memory was refused."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _NO_MEMORY)


@contextmanager
def in_words(say: Callable[[str], str]) -> Generator[None]:
    """Turn whatever a library raises inside into one sentence.

    Errors of ours, and those for want of memory, pass as they are: the one has its sentence, the
    other is not the input's fault.

    Args:
        say: makes the sentence of the library's reason.

    Raises:
        ShearlingError: something was raised.
    """
    try:
        yield
    except ShearlingError:
        raise
    except Exception as error:
        if lacks_memory(error):
            raise
        raise ShearlingError(say(reason(error))) from error
