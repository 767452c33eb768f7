"""Scores: their order, their file, and what is refused."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shearling.errors import ShearlingError
from shearling.scoring.scores import Scores
from shearling.table.families.base import gated_decoder
from shearling.table.values import Shape

FILE: dict[str, Any] = {"criterion": "taylor", "axis": "layers", "scores": [3.0, 1.0, 2.0]}
UNITS: dict[str, Any] = {
    "kind": "unit-scores", "criterion": "energy", "axis": "mlp", "scores": [[1.0, 2.0]],
}  # fmt: skip
MODEL = st.just({"name": "tiny", "fingerprint": "ab"})
LAYOUT = gated_decoder(SimpleNamespace(tie_word_embeddings=False))
SHAPE = Shape(
    {"layers": 3, "hidden": 7, "vocab": 11, "heads": 9, "kv_heads": 3, "head_dim": 2, "mlp": 5}
)


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
        "layers",
        (tuple(values),),
        tuple(units[:first]),
        tuple(units[first:second]),
        draw(st.none() | st.floats(0, 1e300)),
        draw(st.fixed_dictionaries({}, optional={"seconds": st.floats(0, 1e9), "model": MODEL})),
    )


@st.composite
def any_unit_scores(draw: st.DrawFn) -> Scores:
    values = st.floats(allow_nan=False, allow_infinity=False)
    row = st.tuples(*[values] * draw(st.integers(1, 4)))
    return Scores(
        draw(st.text(st.characters(codec="utf-8"))),
        draw(st.sampled_from(["mlp", "hidden"])),
        tuple(draw(st.lists(row, min_size=1))),
        details=draw(st.fixed_dictionaries({}, optional={"seconds": st.floats(0, 1e9)})),
    )


@given(scores=any_scores() | any_unit_scores())
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
    assert Scores("c", "layers", (values,)).order == (4, 1, 3, 0, 2)
    assert Scores("c", "layers", (values,), protected=(4, 3)).order == (1, 0, 2)
    assert Scores("c", "layers", (values,), (4,), removal_order=(2, 1)).order == (2, 1, 3, 0)


def test_file_says_what_it_is() -> None:
    found = Scores("greedy", "layers", ((3.0, 1.0),), (), (1,), 9.5).with_details(seconds=2)
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
    units = Scores("energy", "mlp", ((1.5, 0.25), (3.0, 1e-30))).with_details(seconds=2)
    assert units.as_json() == {
        "kind": "unit-scores",
        "criterion": "energy",
        "axis": "mlp",
        "scores": [[1.5, 0.25], [3.0, 1e-30]],
        "seconds": 2,
    }


def test_only_an_axis_of_one_row_has_values() -> None:
    assert Scores("energy", "hidden", ((1.0, 2.0),)).values == (1.0, 2.0)
    with pytest.raises(ValueError, match="unpack"):
        _ = Scores("energy", "mlp", ((1.0,), (2.0,))).values


@pytest.mark.parametrize(
    ("axis", "rows", "sentence"),
    [
        ("layers", ((1.0, math.nan), ), "taylor gives no finite score for 1 of 2 blocks of tiny, "
         "the first being 1"),
        ("mlp", ((1.0,), (math.inf,)), "taylor gives .* not finite numbers to mlp in block 1"),
        ("hidden", ((math.nan,),), "taylor gives .* not finite numbers to hidden of the model"),
    ],
)  # fmt: skip
def test_finite(axis: str, rows: Any, sentence: str) -> None:
    finite = Scores("taylor", axis, tuple((1.0,) * len(row) for row in rows))
    assert finite.require_finite("tiny") is finite
    with pytest.raises(ShearlingError, match=sentence):
        Scores("taylor", axis, rows).require_finite("tiny")


@pytest.mark.parametrize(
    ("axis", "rows", "sentence"),
    [
        ("mlp", (), "rows of equally many numbers"),
        ("mlp", ((),), "rows of equally many numbers"),
        ("mlp", ((1.0,), (1.0, 2.0)), r"rows of \[1, 2\]"),
        ("layers", ((1.0,), (2.0,)), "one row, but 2 rows"),
    ],
)
def test_rows_that_are_refused(axis: str, rows: Any, sentence: str) -> None:
    with pytest.raises(ShearlingError, match=sentence):
        Scores("taylor", axis, rows)


def test_a_file_by_hand_is_enough(tmp_path: Path) -> None:
    assert Scores.load(written(tmp_path / "s.json", FILE)).order == (1, 2, 0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("no JSON", "is not valid JSON .*Expecting value"),
        ("", "is not valid JSON"),
        ([1, 2], "holds a list, but an object"),
        (3, "holds a int, but an object"),
        ({}, r"is not a scores file \(criterion is missing where a text"),
        ({"criterion": "taylor", "axis": "layers"}, "scores is missing where a list of numbers"),
        ({"kind": "evaluation", "perplexity": 3.0}, "criterion is missing"),
        (FILE | {"scores": ["high"]}, r"scores is \['high'\] where a list of numbers"),
        (FILE | {"scores": 3}, "scores is 3 where a list of numbers"),
        (FILE | {"protected": [math.inf]}, "is not a scores file"),
        (FILE | {"scores": [1.0, math.nan]}, "not finite numbers"),
        (FILE | {"scores": [1.0, -math.inf]}, "not finite numbers"),
        (FILE | {"scores": []}, r"scores is \[\] where at least one number"),
        (FILE | {"scores": [[1.0]]}, "is not a scores file"),
        (UNITS | {"kind": "scores"}, "is not a scores file"),
        (UNITS | {"scores": [[1.0], [1.0, 2.0]]}, r"scores is \[1, 2\] where equally many"),
        (UNITS | {"scores": []}, r"scores is \[\] where a list of numbers for each"),
        (UNITS | {"scores": [[]]}, "where a list of numbers for each block"),
        (UNITS | {"scores": [[math.nan, 1.0]]}, "not finite numbers"),
        (UNITS | {"scores": [1.0]}, "is not a scores file"),
        (UNITS | {"scores": [["a"]]}, "is not a scores file"),
        (
            {"kind": "unit-scores", "criterion": "energy", "scores": [[1.0]]},
            "axis is missing where a text",
        ),
        (FILE | {"protected": [3]}, r"protected is \[3\] where different blocks of 3"),
        (FILE | {"removal_order": [-1]}, r"removal_order\[0\] is -1 where a whole number"),
        (FILE | {"removal_order": [1, 1]}, r"removal_order is \[1, 1\] where different blocks"),
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
    with pytest.raises(ShearlingError, match="is no UTF-8 text"):
        Scores.load(tmp_path / "binary.json")


def test_require() -> None:
    good, path = Scores("taylor", "layers", ((1.0, 2.0, 3.0),)), Path("scores.json")
    assert good.require(LAYOUT, SHAPE, file=path) is good
    units = Scores("taylor", "mlp", ((1.0,) * 5,) * 3)
    assert units.require(LAYOUT, SHAPE) is units
    channels = Scores("taylor", "hidden", ((1.0,) * 7,))
    assert channels.require(LAYOUT, SHAPE) is channels


@pytest.mark.parametrize(
    ("axis", "rows", "sentence"),
    [
        ("layers", ((1.0, 2.0),), "s.json scores 2 units of layers, but the model has 3 layers;"),
        ("mlp", ((1.0,) * 5,) * 2, "s.json scores 2 x 5 units of mlp, .* has 3 x 5 mlp; score"),
        ("mlp", ((1.0,) * 5,), "s.json scores 1 x 5 units of mlp, .* has 3 x 5 mlp; score"),
        ("hidden", ((1.0,) * 7,) * 3, "s.json scores 3 x 7 units of hidden, .* has 1 x 7 hidden;"),
        ("experts", ((1.0,),), "s.json scores 1 units of experts, .* no such axis; score"),
    ],
)
def test_scores_of_another_model(axis: str, rows: Any, sentence: str) -> None:
    with pytest.raises(ShearlingError, match=sentence):
        Scores("taylor", axis, rows).require(LAYOUT, SHAPE, file=Path("s.json"))
