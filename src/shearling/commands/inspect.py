"""``shearling inspect``: a model's shape, counts, costs and lineage."""

from __future__ import annotations

from dataclasses import dataclass

from shearling.commands.options import Json, ModelOptions, print_result
from shearling.commands.takes import takes_options


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """What the command line says."""

    model: ModelOptions
    as_json: Json = False


@takes_options
def inspect(options: InspectOptions) -> None:
    """Show a model's shape, exact counts, costs and lineage; reads headers, not weights."""
    from shearling.model.checkpoint import Checkpoint
    from shearling.model.inspect import inspect as look
    from shearling.model.inspect import lines

    facts = look(Checkpoint.open(options.model.given()))
    print_result(facts, options.as_json, lines(facts))
