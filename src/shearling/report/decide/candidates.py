"""What models are chosen by: size, speed and quality, with what is known of their noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field

from shearling.evaluate.abilities.shares import Share, mean_share
from shearling.report.decide.abilities import left_in_models
from shearling.report.decide.accuracy import means, shared_tasks
from shearling.report.decide.compare import Load, by_load, by_text, same_tokens
from shearling.report.numbers import exact, plural
from shearling.report.records.results import Model, Results

SAME_SIZE = 0.01  # models whose sizes differ by less are not told apart by it


@dataclass(frozen=True)
class Value:
    """A figure, and the ends of what it may be: its own value where no noise is known."""

    value: float
    low: float
    high: float

    @staticmethod
    def exactly(value: float) -> Value:
        """One without noise."""
        return Value(value, value, value)

    @property
    def margin(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Measure:
    """One way to tell models apart: a figure for each that has one, by fingerprint."""

    name: str  # "mean accuracy of 7 tasks", "perplexity on wikitext"
    kind: str  # size, speed, accuracy, abilities or perplexity
    values: Mapping[str, Value]
    higher_is_better: bool
    note: str = ""

    def of(self, model: Model) -> Value | None:
        """A model's figure, or None."""
        return self.values.get(model.fingerprint)

    def loss(self, before: Model, after: Model) -> float | None:
        """How much worse one model is than another, as a share; below zero: better."""
        first, second = self.of(before), self.of(after)
        if first is None or second is None or first.value <= 0:
            return None
        change = second.value / first.value - 1
        return -change if self.higher_is_better else change

    def alike(self, one: Model, other: Model) -> bool:
        """Whether noise that is known explains a difference: margins of 95 % add as squares do."""
        first, second = self.of(one), self.of(other)
        if first is None or second is None:
            return False
        return abs(first.value - second.value) <= math.hypot(first.margin, second.margin)

    def better(self, one: Model, other: Model) -> bool | None:
        """Whether one model is better beyond noise than the other; None where it is not known."""
        first, second = self.of(one), self.of(other)
        if first is None or second is None:
            return None
        return first.low > second.high if self.higher_is_better else first.high < second.low


@dataclass(frozen=True)
class Field:
    """All that the models given are chosen by. The baseline comes first."""

    models: tuple[Model, ...]
    size: Measure
    speed: Measure | None
    quality: tuple[Measure, ...]  # the accuracy first, then abilities, then perplexities
    abilities: Mapping[str, Sequence[Share]] = dataclass_field(default_factory=dict)

    @property
    def baseline(self) -> Model:
        """What all others are measured against."""
        return self.models[0]

    @property
    def measures(self) -> list[Measure]:
        """Every one there is."""
        return [self.size, *([self.speed] if self.speed else []), *self.quality]


def field_of(results: Results) -> Field:
    """What the models of some results are chosen by; the first of them is the baseline."""
    left = left_in_models(results)
    quality = [*_accuracy(results), *_abilities(results, left), *_perplexities(results)]
    return Field(results.models, _size(results.models), _speed(results), tuple(quality), left)


def _size(models: Sequence[Model]) -> Measure:
    """Bytes on disk, in which quantisation shows, or parameters where some bytes are not known."""
    on_disk = all(model.bytes is not None for model in models)
    sizes = {one.fingerprint: one.bytes if on_disk else one.parameters for one in models}
    values = {
        key: Value(size, (1 - SAME_SIZE / 2) * size, (1 + SAME_SIZE / 2) * size)
        for key, size in sizes.items()
        if size is not None
    }
    return Measure("size on disk" if on_disk else "parameters", "size", values, False)


def _speed(results: Results) -> Measure | None:
    """Decoding at the load at which most models were timed; of several, the smallest batch."""
    known = {model.fingerprint for model in results.models}
    loads = {load: {k: run for k, run in runs.items() if k in known}
             for load, runs in by_load(results).items()}  # fmt: skip
    timed = [load for load, runs in loads.items() if runs]
    if not timed:
        return None

    def rank(load: Load) -> tuple[int, int, bool]:
        return -len(loads[load]), load[0], load[4] != "transformers"

    batch, prompt, new, machine, engine = best = min(timed, key=rank)
    values = {
        key: Value(run.decode.median, run.decode.min, run.decode.max)
        for key, run in loads[best].items()
    }
    note = f"{engine}, batch {exact(batch)}, prompt of {exact(prompt)}, {exact(new)} new tokens"
    return Measure("decode speed", "speed", values, True, f"{note}, on {machine}")


def _accuracy(results: Results) -> list[Measure]:
    known = {model.fingerprint for model in results.models}
    accuracies = {
        key: Value(one.value, one.value - (one.margin or 0), one.value + (one.margin or 0))
        for key, one in means(results).items()
        if key in known
    }
    if not accuracies:
        return []
    tasks = plural(len(shared_tasks(results)), "task")
    name = f"mean accuracy of {tasks}" if tasks != "1 task" else "accuracy on one task"
    return [Measure(name, "accuracy", accuracies, True)]


def _abilities(results: Results, left: Mapping[str, Sequence[Share]]) -> list[Measure]:
    """The mean share that is left of the baseline's abilities, which has 1 of its own."""
    if not left:
        return []
    means = {key: mean_share(of) for key, of in left.items()}
    values = {key: Value(one.left, *one.interval) for key, one in means.items()}
    values[results.models[0].fingerprint] = Value.exactly(1.0)
    return [Measure("share of abilities left", "abilities", values, True)]


def _perplexities(results: Results) -> list[Measure]:
    """One a text: of several ways to cut it into windows, that in which most models were read."""
    baseline = results.models[0]
    alike = {model.fingerprint for model in results.models if same_tokens(baseline, model)}
    texts: dict[str, Measure] = {}
    for (text, windows), evaluations in by_text(results).items():
        values = {
            key: Value.exactly(one.perplexity) for key, one in evaluations.items() if key in alike
        }
        measure = Measure(f"perplexity on {text}", "perplexity", values, False, windows)
        if values and (text not in texts or len(values) > len(texts[text].values)):
            texts[text] = measure
    return list(texts.values())
