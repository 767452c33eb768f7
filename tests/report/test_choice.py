"""Which model is picked, which are beaten, and which lie on the front."""

from __future__ import annotations

import math
from typing import Any

import pytest

from shearling.report.decide.accuracy import MeanAccuracy, beyond_noise, mean
from shearling.report.decide.candidates import Field, Measure, Value
from shearling.report.decide.choice import choose, front
from shearling.report.records.quality import TaskFigure
from shearling.report.records.results import Model


def task(value: float, stderr: float | None) -> TaskFigure:
    return TaskFigure("t", "acc", value, stderr, 0, None, 100)


def field(rows: dict[str, dict[str, Any]]) -> Field:
    """A field from sizes, speeds, accuracies and perplexities; an absent one is not measured."""
    models = tuple(Model(name, name, "made", {}, 1, 1) for name in rows)

    def measure(kind: str, *, higher: bool, noise: float = 0.0) -> Measure:
        values = {
            name: Value(row[kind], row[kind] * (1 - noise), row[kind] * (1 + noise))
            for name, row in rows.items()
            if kind in row
        }
        return Measure(kind, kind, values, higher)

    quality = (measure("accuracy", higher=True, noise=0.02), measure("perplexity", higher=False))
    return Field(
        models,
        measure("size", higher=False, noise=0.005),
        measure("speed", higher=True, noise=0.01),
        tuple(one for one in quality if one.values),
    )


USUAL: dict[str, dict[str, Any]] = {
    "base": {"size": 100, "speed": 10.0, "perplexity": 20.0, "accuracy": 0.6},
    "good": {"size": 80, "speed": 12.0, "perplexity": 20.8, "accuracy": 0.59},
    "small": {"size": 50, "speed": 18.0, "perplexity": 60.0, "accuracy": 0.40},
    "poor": {"size": 80, "speed": 12.0, "perplexity": 25.0, "accuracy": 0.55},
    "worst": {"size": 120, "speed": 8.0, "perplexity": 90.0, "accuracy": 0.30},
}


def name(model: Model | None) -> str | None:
    return model.name if model else None


def test_the_smallest_that_is_good_enough() -> None:
    choice = choose(field(USUAL), 0.05)
    assert name(choice.pick) == "good"
    assert name(choice.fastest) == "small"
    assert choice.quickest is None  # it is the pick
    assert choice.near_miss is None
    assert choice.loss(choice.field.models[1]) == pytest.approx(0.04)


@pytest.mark.parametrize(("within", "pick"), [(0.01, "base"), (0.05, "good"), (3.0, "small")])
def test_how_much_may_be_lost(within: float, pick: str) -> None:
    choice = choose(field(USUAL), within)
    assert name(choice.pick) == pick
    assert name(choice.near_miss) == ("good" if pick == "base" else None)


def test_the_worst_measure_decides() -> None:
    rows = USUAL | {"good": USUAL["good"] | {"accuracy": 0.5}}
    assert name(choose(field(rows), 0.05).pick) == "base"


def test_who_is_beaten_throughout() -> None:
    choice = choose(field(USUAL), 0.05)
    # the poor one is as large and as fast as the good one; the small one has its merits
    assert {key: one.name for key, one in choice.dominated.items()} == {
        "poor": "good",
        "worst": "small",
    }


def test_better_in_one_thing_is_not_beaten() -> None:
    rows = {"base": USUAL["base"], "other": USUAL["worst"] | {"speed": 20.0}}
    assert choose(field(rows), 0.05).dominated == {}


def test_equal_models_beat_nobody() -> None:
    rows = dict.fromkeys(("base", "copy", "again"), USUAL["base"])
    choice = choose(field(rows), 0.05)
    assert choice.dominated == {}
    assert name(choice.pick) == "base"
    assert front(choice.field.models, choice.field.size, choice.field.quality[0]) == [True] * 3


def test_speeds_within_their_spread_are_equal() -> None:
    other = USUAL["good"] | {"perplexity": 21.0, "speed": 12.1}  # faster by less than its noise
    choice = choose(field({"base": USUAL["base"], "good": USUAL["good"], "other": other}), 0.05)
    assert {key: one.name for key, one in choice.dominated.items()} == {"other": "good"}


def test_of_models_as_small_the_better_is_picked() -> None:
    # smaller by less than a hundredth, and worse
    rows = USUAL | {"tiny": USUAL["good"] | {"size": 79.8, "perplexity": 20.9}}
    assert name(choose(field(rows), 0.05).pick) == "good"


def test_the_fastest_that_is_good_enough() -> None:
    rows = USUAL | {"int8": {"size": 52, "speed": 9.0, "perplexity": 20.1, "accuracy": 0.6}}
    choice = choose(field(rows), 0.05)
    assert (name(choice.pick), name(choice.quickest)) == ("int8", "good")


def test_a_model_that_was_not_measured_is_neither_picked_nor_beaten() -> None:
    rows = USUAL | {"dark": {"size": 10}, "half": {"size": 10, "perplexity": 20.0}}
    choice = choose(field(rows), 0.05)
    assert name(choice.pick) == "good"
    assert [one.name for one in choice.unmeasured] == ["dark", "half"]
    assert not {"dark", "half"} & choice.dominated.keys()


def test_without_a_quality_of_the_baseline_there_is_no_pick() -> None:
    choice = choose(field(USUAL | {"base": {"size": 100}}), 0.05)
    assert choice.pick is None
    assert choice.deciding == ()


def test_a_measure_that_few_have_does_not_decide() -> None:
    rows = {key: {k: v for k, v in row.items() if k != "accuracy" or key in ("base", "good")}
            for key, row in USUAL.items()}  # fmt: skip
    assert [one.kind for one in choose(field(rows), 0.05).deciding] == ["perplexity"]


def test_the_front_against_a_loop_over_pairs() -> None:
    """Without noise, the front is what the definition says."""
    points = [(x, y) for x in range(1, 8) for y in range(1, 8) if (3 * x + 5 * y) % 4 == 0]
    models = [Model(str(at), str(at), "made", {}) for at in range(len(points))]
    across, up = (
        Measure("m", "m", {str(at): Value.exactly(p[k]) for at, p in enumerate(points)}, k == 1)
        for k in (0, 1)
    )
    expected = [
        not any(a <= x and b >= y and (a, b) != (x, y) for a, b in points) for x, y in points
    ]
    assert front(models, across, up) == expected
    assert 0 < sum(expected) < len(points)


def test_what_exceeds_noise() -> None:
    assert beyond_noise(task(0.6, 0.01), task(0.55, 0.01))
    assert beyond_noise(task(0.6, 0.02), task(0.55, 0.02)) is False
    assert beyond_noise(task(0.6, None), task(0.1, 0.01)) is None
    assert beyond_noise(task(0.6, None), task(0.6, None)) is False


def test_the_mean_of_tasks() -> None:
    found = mean([task(0.2, 0.03), task(0.4, 0.04)])
    assert found == MeanAccuracy(pytest.approx(0.3), pytest.approx(0.025))
    assert found.margin == pytest.approx(1.96 * 0.025)
    assert mean([task(0.2, 0.03), task(0.4, None)]).stderr is None
    assert math.isclose(mean([task(0.2, None)]).value, 0.2)
