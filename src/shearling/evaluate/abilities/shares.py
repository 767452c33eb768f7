"""What is left of a source's abilities in a model that was made of it.

Of an item whose right answer has T tokens in the source's words, the loss is its negative
log-likelihood over T. The share that is left of an ability is exp(-d), d being the mean over items
of the model's loss less the source's: 1 for the source itself, and the factor by which the model
gives a token of the right answers less probability, as a geometric mean. It moves before a single
answer turns wrong. Of free writing the loss is the share of 4-grams that repeat.

Both models answered the same items, so that the interval is of paired differences: d ± 1.96
standard errors.

A change that helps one ability and harms another can leave the mean where it was. How far the
answers moved, either way, is the mean of the differences' sizes: 0 for the source itself.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from shearling.evaluate.abilities.results import Abilities, AbilityFigures
from shearling.evaluate.intervals import around, standard_error

MOST = 700.0  # nats: exp of more is no number
SAFE = 0.95  # a share below this stands out


@dataclass(frozen=True)
class Share:
    """What is left of one ability, or of all: 1 is as much as the source has.

    Attributes:
        difference: of the losses, model less source; ``error`` is its standard error.
    """

    ability: str
    difference: float
    error: float

    @property
    def left(self) -> float:
        """The share itself."""
        return _share_of(self.difference)

    @property
    def interval(self) -> tuple[float, float]:
        """Of 95 %."""
        low, high = around(self.difference, self.error)
        return _share_of(high), _share_of(low)

    @property
    def low(self) -> bool:
        """Whether it stands out."""
        return self.left < SAFE


def comparable(source: Abilities, model: Abilities) -> bool:
    """Whether two models were asked the same."""
    return source.asked_sha256 == model.asked_sha256 and source.limit == model.limit


def shares(source: Abilities, model: Abilities) -> list[Share]:
    """Of every ability that both have, the worst first; none where the items were others."""
    left = [
        Share(name, statistics.fmean(of), standard_error(of))
        for name, of in _paired(source, model).items()
    ]
    return sorted(left, key=lambda share: -share.difference)


def moved(source: Abilities, model: Abilities) -> tuple[float, float, float]:
    """How far the losses of all items moved, either way: the mean, and its 95 % interval.

    Two models that were asked the same, and share an ability.
    """
    sizes = [abs(one) for of in _paired(source, model).values() for one in of]
    mean = statistics.fmean(sizes)
    return (mean, *around(mean, standard_error(sizes)))


def _paired(source: Abilities, model: Abilities) -> dict[str, list[float]]:
    """Differences of every item, of the abilities that both have."""
    if not comparable(source, model):
        return {}
    return {
        name: _differences(one, model.abilities[name])
        for name, one in source.abilities.items()
        if name in model.abilities and len(one.losses) == len(model.abilities[name].losses)
    }


def _share_of(difference: float) -> float:
    return math.exp(min(-difference, MOST))


def mean_share(left: Sequence[Share]) -> Share:
    """Of all abilities alike: a geometric mean. The error is that of a mean of independent ones."""
    error = math.sqrt(sum(share.error**2 for share in left)) / len(left)
    return Share("all", statistics.fmean(share.difference for share in left), error)


def _differences(source: AbilityFigures, model: AbilityFigures) -> list[float]:
    """Of every item, the model's loss less the source's."""
    ours = model.losses
    if source.lengths and model.lengths:  # a model that spells in other tokens is not favoured
        ours = tuple(
            loss * tokens / theirs
            for loss, tokens, theirs in zip(ours, model.lengths, source.lengths, strict=True)
        )
    return [after - before for after, before in zip(ours, source.losses, strict=True)]
