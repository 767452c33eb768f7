"""What runs that trained a model leave behind: of healing, of reference losses, of gates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from shearling.report.records.fields import Fields, public
from shearling.report.records.refs import ModelRef, read_created, read_ref

T = TypeVar("T")
Series = dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Healing:
    """Held-out losses (nats a token) and weights by domain over the tokens trained on.

    ``seconds`` of training until each look are empty where the file does not have them, and so is
    ``reference``, the loss by domain that a dynamic mix followed.
    """

    model: ModelRef
    recipe: str
    tokens: tuple[int, ...]
    losses: Series
    weights: Series
    seconds: tuple[float, ...]
    reference: dict[str, float]
    created: str


@dataclass(frozen=True)
class Reference:
    """Losses (nats a token, by domain) that a model of some size would have."""

    losses: dict[str, float]
    method: str
    created: str


@dataclass(frozen=True)
class Gated:
    """The gates of one axis: ``units`` in each row of it, ``target`` of which were to stay.

    Attributes:
        expected, wanted: open gates in a row, on average, at every step.
        multipliers: of the Lagrangian's first term at every step; empty where there was none.
        histogram: how many gates ended in each equal part of the range of P(open).
        lost: the share of all open probability on gates that the cut closed.
    """

    axis: str
    units: int
    target: int
    expected: tuple[float, ...]
    wanted: tuple[float, ...]
    multipliers: tuple[float, ...]
    histogram: tuple[int, ...]
    lost: float


@dataclass(frozen=True)
class Learning:
    """How the gates of a model were trained; ``held_out`` is that of the model with its gates."""

    model: ModelRef
    gates: str
    shape: dict[str, int]
    steps: tuple[int, ...]
    axes: tuple[Gated, ...]
    held_out: Healing
    created: str


def read_healing(fields: Fields) -> Healing:
    """Read the history that ``shearling heal`` left."""
    return _held_out(fields, fields.text("recipe"))


def read_reference(fields: Fields) -> Reference:
    """Read what ``shearling reference`` wrote."""
    how = fields.mapping("how")
    return Reference(
        losses=_numbers(fields, "losses"),
        method=public(str(how.get("method") or "")),
        created=read_created(fields),
    )


def read_learning(fields: Fields) -> Learning:
    """Read the history that ``shearling learn`` left.

    Raises:
        ShearlingError: a field is missing, or an axis has no target, sizes or histogram.
    """
    steps = fields.children("steps")
    gates = fields.text("gates")
    shape = fields.child("source_shape")
    return Learning(
        model=read_ref(fields.child("model")),
        gates=gates,
        shape={axis: shape.integer(axis) for axis in shape.values},
        steps=tuple(step.integer("step") for step in steps),
        axes=tuple(_gated(fields, axis, steps) for axis in fields.child("targets").values),
        held_out=_held_out(fields, f"{gates} gates"),
        created=read_created(fields),
    )


def _gated(fields: Fields, axis: str, steps: list[Fields]) -> Gated:
    target, units = (fields.child(key).integer(axis) for key in ("targets", "units"))
    if not 0 < target <= units:
        fields.child("targets").refuse(axis, f"one of 1 to {units} units")
    histogram = fields.child("histograms").integers(axis)
    if not histogram or min(histogram) < 0:
        fields.child("histograms").refuse(axis, "a list of counts")
    multiplied = bool(steps) and steps[0].child("multipliers").has(axis)
    return Gated(
        axis=axis,
        units=units,
        target=target,
        expected=tuple(step.child("expected").number(axis) for step in steps),
        wanted=tuple(step.child("wanted").number(axis) for step in steps),
        multipliers=tuple(
            step.child("multipliers").number(axis) for step in (steps if multiplied else ())
        ),
        histogram=histogram,
        lost=fields.child("probability_lost").number(axis),
    )


def _held_out(fields: Fields, recipe: str) -> Healing:
    """The looks at held-out text; every one has the domains of the first."""
    looks = fields.children("looks")
    domains = list(looks[0].mapping("losses")) if looks else []

    def over(key: str) -> Series:
        return {
            public(name): tuple(look.child(key).number(name) for look in looks) for name in domains
        }

    timed = bool(looks) and looks[0].has("seconds")
    return Healing(
        model=read_ref(fields.child("model")),
        recipe=recipe,
        tokens=_each(looks, lambda look: look.integer("tokens")),
        losses=over("losses"),
        weights=over("weights"),
        seconds=_each(looks, lambda look: look.number("seconds")) if timed else (),
        reference=_numbers(fields, "reference") if fields.has("reference") else {},
        created=read_created(fields),
    )


def _each(looks: list[Fields], read: Callable[[Fields], T]) -> tuple[T, ...]:
    return tuple(read(look) for look in looks)


def _numbers(fields: Fields, key: str) -> dict[str, float]:
    values = fields.child(key)
    return {public(name): values.number(name) for name in values.values}
