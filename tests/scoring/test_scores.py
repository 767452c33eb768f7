"""Scores: their order, their file, and what is refused."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shearling.errors import ShearlingError
from shearling.scoring.scores import Scores

FILE: dict[str, Any] = {"criterion": "taylor", "axis": "layers", "scores": [3.0, 1.0, 2.0]}


def written(path: Path, data: object) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


@st.composite
def any_scores(draw: st.DrawFn) -> Scores:
    values = draw(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1))
    units = draw(st.permutations(range(len(values))))
    first, second = sorted(draw(st.tuples(*[st.integers(0, len(values))] * 2)))
    return Scores(
        draw(st.text(st.characters(codec="utf-8"))),
        draw(st.sampled_from(["layers", "mlp"])),
        tuple(values),
        tuple(units[:first]),
        tuple(units[first:second]),
        draw(st.none() | st.floats(0, 1e300)),
        draw(st.fixed_dictionaries({}, optional={"seconds": st.integers(), "model": st.just({})})),
    )


@given(scores=any_scores())
def test_round_trip(scores: Scores, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.json"
    assert Scores.load(written(path, scores.as_json())) == scores


@given(scores=any_scores())
def test_order(scores: Scores) -> None:
    order = scores.order
    assert sorted((*order, *scores.protected)) == list(range(len(scores.values)))
    given_first, rest = order[: len(scores.removal_order)], order[len(scores.removal_order) :]
    assert given_first == scores.removal_order
    for one, next_ in pairwise(rest):
        assert (scores.values[one], one) < (scores.values[next_], next_)


def test_order_of_ties_and_precedence() -> None:
    values = (2.0, 1.0, 2.0, 1.0, 0.0)
    assert Scores("c", "layers", values).order == (4, 1, 3, 0, 2)
    assert Scores("c", "layers", values, protected=(4, 3)).order == (1, 0, 2)
    assert Scores("c", "layers", values, (4,), removal_order=(2, 1)).order == (2, 1, 3, 0)


def test_file_says_what_it_is() -> None:
    found = Scores("greedy", "layers", (3.0, 1.0), (), (1,), 9.5).with_details(seconds=2)
    assert found.with_details(seed=1).details == {"seconds": 2, "seed": 1}
    assert found.as_json() == {
        "kind": "scores",
        "criterion": "greedy",
        "axis": "layers",
        "scores": [3.0, 1.0],
        "order": [1, 0],
        "protected": [],
        "removal_order": [1],
        "baseline_perplexity": 9.5,
        "seconds": 2,
    }


def test_a_file_by_hand_is_enough(tmp_path: Path) -> None:
    assert Scores.load(written(tmp_path / "s.json", FILE)).order == (1, 2, 0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("no JSON", "is not a scores file .*Expecting value"),
        ("", "is not a scores file"),
        ([1, 2], "is not a scores file"),
        (3, "is not a scores file"),
        ({}, "it has no 'criterion'"),
        ({"criterion": "taylor", "axis": "layers"}, "it has no 'scores'"),
        ({"kind": "evaluation", "perplexity": 3.0}, "it has no 'criterion'"),
        (FILE | {"scores": ["high"]}, "could not convert"),
        (FILE | {"scores": 3}, "not iterable"),
        (FILE | {"protected": [math.inf]}, "is not a scores file"),
        (FILE | {"scores": [1.0, math.nan]}, "not finite numbers"),
        (FILE | {"scores": [1.0, -math.inf]}, "not finite numbers"),
        (FILE | {"protected": [3]}, r"gives \[3\] as protected, but it scores 3 units"),
        (FILE | {"removal_order": [-1]}, r"gives \[-1\] as removal_order"),
        (FILE | {"removal_order": [1, 1]}, r"gives \[1, 1\] as removal_order"),
    ],
)
def test_what_is_no_scores_file(tmp_path: Path, data: object, message: str) -> None:
    path = written(tmp_path / "s.json", data)
    with pytest.raises(ShearlingError, match=message) as caught:
        Scores.load(path)
    assert str(path) in str(caught.value)
    assert "shearling score MODEL" in str(caught.value) or "score the model again" in str(
        caught.value
    )


def test_absent_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(ShearlingError, match="No such file"):
        Scores.load(tmp_path / "absent.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ShearlingError, match="is not a scores file"):
        Scores.load(tmp_path / "binary.json")


def test_require() -> None:
    scores, path = Scores("taylor", "layers", (1.0, 2.0)), Path("scores.json")
    assert scores.require(axis="layers", size=2, path=path) is scores
    with pytest.raises(ShearlingError, match=r"scores\.json scores 2 units of layers, .* 3 layers"):
        scores.require(axis="layers", size=3, path=path)
    with pytest.raises(ShearlingError, match="2 units of layers, but the model has 2 mlp"):
        scores.require(axis="mlp", size=2, path=path)
