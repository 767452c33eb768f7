"""What runs that trained a model leave behind: of healing, of reference losses, of gates."""

from __future__ import annotations

from dataclasses import dataclass, replace

from shearling.files.results import public
from shearling.gates.results import LearningHistory
from shearling.model.refs import ModelRef
from shearling.train.results import HealingHistory

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


def healing_of(history: HealingHistory) -> Healing:
    """A healing run, its looks turned into series."""
    held_out = _held_out(history, history.recipe)
    reference = {public(name): loss for name, loss in (history.reference or {}).items()}
    return replace(held_out, reference=reference)


def learning_of(history: LearningHistory) -> Learning:
    """A learning run, its steps and looks turned into series."""
    return Learning(
        model=history.model,
        gates=history.gates,
        shape=history.source_shape,
        steps=tuple(step.step for step in history.steps),
        axes=tuple(_gated(history, axis) for axis in history.targets),
        held_out=_held_out(history, f"{history.gates} gates"),
        created=history.created,
    )


def _gated(history: LearningHistory, axis: str) -> Gated:
    steps = history.steps
    multiplied = bool(steps) and axis in steps[0].multipliers
    return Gated(
        axis=axis,
        units=history.units[axis],
        target=history.targets[axis],
        expected=tuple(step.expected[axis] for step in steps),
        wanted=tuple(step.wanted[axis] for step in steps),
        multipliers=tuple(step.multipliers[axis] for step in (steps if multiplied else ())),
        histogram=history.histograms[axis],
        lost=history.probability_lost[axis],
    )


def _held_out(history: HealingHistory | LearningHistory, recipe: str) -> Healing:
    looks = history.looks
    domains = list(looks[0].losses) if looks else []
    timed = bool(looks) and looks[0].seconds is not None
    return Healing(
        model=history.model,
        recipe=recipe,
        tokens=tuple(look.tokens for look in looks),
        losses={public(name): tuple(look.losses[name] for look in looks) for name in domains},
        weights={public(name): tuple(look.weights[name] for look in looks) for name in domains},
        seconds=tuple(look.seconds or 0.0 for look in looks) if timed else (),
        reference={},
        created=history.created,
    )
