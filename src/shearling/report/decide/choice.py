"""Which to ship: the smallest that is good enough, the fastest, and those beaten throughout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shearling.report.decide.candidates import Field, Measure
from shearling.report.records.results import Model


@dataclass(frozen=True)
class Decision:
    """What the figures say; ``pick`` is None where no quality was measured of the baseline."""

    field: Field
    within: float  # the share of the baseline's quality that may be lost
    deciding: tuple[Measure, ...]  # the measures of quality that a model has to pass
    pick: Model | None
    near_miss: Model | None  # the least loss among smaller models, where none is good enough
    quickest: Model | None  # the fastest of those good enough, where it is not the pick
    fastest: Model | None
    dominated: dict[str, Model]  # fingerprint -> a model that beats it throughout
    unmeasured: tuple[Model, ...]  # those that lack a deciding measure
    broken: tuple[Model, ...]  # those that are not what they were meant to be: never picked

    def loss(self, model: Model) -> float | None:
        """The largest loss against the baseline over the deciding measures; None if one lacks."""
        losses = [measure.loss(self.field.baseline, model) for measure in self.deciding]
        known = [one for one in losses if one is not None and not math.isnan(one)]
        return max(known) if known and len(known) == len(losses) else None


def choose(field: Field, within: float) -> Decision:
    """Decide among models.

    Args:
        field: the models and their figures.
        within: the largest share of the baseline's quality that may be lost on any measure: of an
            accuracy itself, or by how much a perplexity may be higher.
    """
    deciding = _deciding(field)
    draft = Decision(field, within, deciding, None, None, None, None, {}, (), ())
    losses = {model.fingerprint: draft.loss(model) for model in field.models}
    broken = tuple(model for model in field.models if _is_broken(model))
    sound = [model for model in field.models if model not in broken]
    good = [
        model
        for model in sound
        if (loss := losses[model.fingerprint]) is not None and loss <= within
    ]
    missed = [
        model
        for model in sound
        if losses[model.fingerprint] is not None and model not in good and _smaller(field, model)
    ]
    pick = _pick(field, good, losses)
    none_smaller = pick is not None and not any(_smaller(field, model) for model in good)
    quickest = _fastest(field, good)
    return Decision(
        field,
        within,
        deciding,
        pick,
        min(missed, key=lambda one: losses[one.fingerprint] or 0.0)
        if none_smaller and missed
        else None,
        quickest if pick and quickest and _faster(field, quickest, pick) else None,
        _fastest(field, field.models),
        _dominated(field),
        tuple(model for model in field.models if losses[model.fingerprint] is None),
        broken,
    )


def front(models: Sequence[Model], across: Measure, up: Measure) -> list[bool]:
    """Which of some models, all with both figures, no other beats in both.

    One beats another if it is not behind beyond noise in ``across`` and better in ``up``, or ahead
    beyond noise and no worse.
    """

    def beats(one: Model, other: Model) -> bool:
        loss = up.loss(other, one)  # of one against other: below zero, it is better
        if loss is None or loss > 0:
            return False
        ahead = across.better(one, other)
        return bool(ahead) or (loss < 0 and not across.better(other, one))

    return [not any(beats(one, model) for one in models) for model in models]


def _deciding(field: Field) -> tuple[Measure, ...]:
    """What the baseline and at least half of the others have, or else what most of them have."""
    others = field.models[1:]
    on_baseline = [one for one in field.quality if one.of(field.baseline) is not None]

    def covered(measure: Measure) -> int:
        return sum(measure.of(model) is not None for model in others)

    measures = [one for one in on_baseline if 2 * covered(one) >= len(others)]
    if not measures and on_baseline:
        measures = [max(on_baseline, key=covered)]
    return tuple(measures)


def _pick(field: Field, good: Sequence[Model], losses: dict[str, float | None]) -> Model | None:
    """The smallest; of those as small, the best, then the fastest, then the first given."""
    sized = [model for model in good if field.size.of(model) is not None] or list(good)
    small = [
        model for model in sized if not any(field.size.better(other, model) for other in sized)
    ]

    def rank(model: Model) -> tuple[float, float]:
        speed = field.speed.of(model) if field.speed else None
        return losses[model.fingerprint] or 0.0, -speed.value if speed else 0.0

    return min(small, key=rank) if small else None


def _is_broken(model: Model) -> bool:
    """Whether the proof of surgery of any step on the way to a model failed."""
    return any(step.proof is not None and not step.proof.passed for step in model.chain)


def _smaller(field: Field, model: Model) -> bool:
    return bool(field.size.better(model, field.baseline))


def _faster(field: Field, one: Model, other: Model) -> bool:
    return bool(field.speed and field.speed.better(one, other))


def _fastest(field: Field, models: Sequence[Model]) -> Model | None:
    """The model with the highest speed, where at least two were timed alike."""
    speed = field.speed
    timed = [one for one in models if speed is not None and speed.of(one) is not None]
    if speed is None or len(timed) < 2:
        return None
    return max(timed, key=lambda one: value.value if (value := speed.of(one)) else -math.inf)


def _dominated(field: Field) -> dict[str, Model]:
    """Models beaten throughout by one that is not itself beaten."""
    beaten = {
        loser.fingerprint: [one for one in field.models if _beats(field, one, loser)]
        for loser in field.models
    }
    beaten_by = {}
    for model in field.models:
        winners = [one for one in beaten[model.fingerprint] if not beaten[one.fingerprint]]
        if winners:
            beaten_by[model.fingerprint] = min(winners, key=lambda one: _size_of(field, one))
    return beaten_by


def _size_of(field: Field, model: Model) -> float:
    size = field.size.of(model)
    return size.value if size else math.inf


def _beats(field: Field, one: Model, other: Model) -> bool:
    """No larger, no slower beyond noise, no worse by any estimate, and clearly ahead in one.

    Both have to have the same figures, a quality among them: silence is no merit and no fault.
    """
    if one is other:
        return False
    had = [(measure.of(one), measure.of(other)) for measure in field.measures]
    if any((a is None) != (b is None) for a, b in had):
        return False
    shared = [measure for measure in field.measures if measure.of(one) is not None]
    qualities = [measure for measure in shared if measure in field.quality]
    if not qualities or field.size not in shared:
        return False
    worse = any(measure.better(other, one) for measure in shared) or any(
        (measure.loss(other, one) or 0.0) > 0 for measure in qualities
    )
    return not worse and any(measure.better(one, other) for measure in shared)
