"""What the parser of the command line refuses, as one sentence.

typer raises its own errors, of which the newer versions have pydantic's as their cause. They are
known here by what they hold, since their classes are not public.
"""

from __future__ import annotations

import re
import sys
from typing import Any

from shearling.commands.listed import SUMMARIES
from shearling.errors import misfit, nearest, shortened

_NO_COMMAND = re.compile(r"No such command '(.*?)'")
_TOO_MANY = re.compile(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)")


def is_refusal(error: BaseException) -> bool:
    """Whether the parser raised an error."""
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def refusal(error: Any) -> str:
    """The option and the value that were given, what was expected, and where help is."""
    context = getattr(error, "ctx", None)
    if context is None:  # not every error knows whose it is
        name = next((word for word in sys.argv[1:] if word in SUMMARIES), None)
    else:
        name = context.info_name if context.parent is not None else None
    command = f"shearling {name}" if name else "shearling"
    return f"{_fault(error, command)}; see `{command} --help`."


def _fault(error: Any, command: str) -> str:
    name, parameter = type(error).__name__, getattr(error, "param", None)
    said = " ".join(error.format_message().split()).rstrip(".")
    if name == "MissingParameter" and parameter is not None:
        return f"{_named(parameter)} was not given, but `{command}` needs it"
    if name == "NoSuchOption":
        close = nearest(error.option_name, _options(error.ctx))
        return f"{error.option_name} was given, but `{command}` has no such option{close}"
    if name == "BadOptionUsage":
        if "requires" in said:
            return f"{error.option_name} was given alone, but a value behind it was expected"
        if "not take" in said:
            return f"{error.option_name} was given with a value, but takes none"
    if parameter is not None:
        return _misfit(error, _named(parameter))
    if unknown := _NO_COMMAND.match(said):
        given = shortened(unknown[1])
        return f"{given} was given, but there is no such command{nearest(given, SUMMARIES)}"
    if extra := _TOO_MANY.match(said):
        taken = [_named(one) for one in error.ctx.command.params if _is_argument(one)]
        most = " ".join(taken) or "options"
        return f"{shortened(extra[1])} was given, but `{command}` takes {most} and no more"
    return said[:1].lower() + said[1:]


def _misfit(error: Any, option: str) -> str:
    """The value of an option or an argument that is not of its kind."""
    mistakes = getattr(error.__cause__, "errors", None)
    if mistakes is None:  # an older typer, whose own words name the value
        return f"{option} was given, but {error.message.rstrip('.')}"
    first = mistakes()[0]
    return misfit(first, f"{option} {shortened(str(first['input']))}")


def _named(parameter: Any) -> str:
    """As it is written: an option's longest name, an argument's in capitals."""
    if _is_argument(parameter):
        return (parameter.name or "").upper()
    return max(parameter.opts, key=len)


def _is_argument(parameter: Any) -> bool:
    return parameter.param_type_name == "argument"


def _options(context: Any) -> list[str]:
    return [name for one in context.command.params for name in (*one.opts, *one.secondary_opts)]
