"""A result writes what it reads, in the order of its fields, and an error says where and what."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from shearling.errors import ShearlingError
from shearling.files.results import Misfit, Name, ResultFile, documented, entry

FILE = Path("flock.json")


@dataclass(frozen=True)
class Fleece:
    weight: float = entry("kilograms")
    colour: str | None = entry(absent=None, omit=True)


@dataclass(frozen=True)
class Flock(ResultFile):
    kind: ClassVar[str] = "flock"
    written_by: ClassVar[str] = "`shear`"

    owner: Name = entry()
    fleeces: tuple[Fleece, ...] = entry("one a sheep")
    counts: dict[str, int] = entry(absent={})
    losses: tuple[float, ...] = entry(absent=())
    interval: tuple[float, float] | None = entry(absent=None)
    sound: bool = entry(absent=False)

    def __post_init__(self) -> None:
        if self.counts.get("lambs", 0) > len(self.fleeces):
            raise Misfit("counts.lambs", "at most one a fleece", self.counts["lambs"])


def written(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "flock", "shearling": "0.0.1", "created": "2026-11-22T10:57:46+00:00",
        "owner": "Ann", "fleeces": [{"weight": 3.5}, {"weight": 4.0, "colour": "black"}],
        "counts": {"lambs": 1}, "losses": [1.0, 2.5], "interval": [0.25, 0.75], "sound": True,
    } | changes  # fmt: skip


def test_a_file_is_read_and_written_key_for_key() -> None:
    again = Flock.from_json(written(), FILE).to_json()
    assert again == written()
    assert list(again) == list(written())
    assert "colour" not in again["fleeces"][0]


def test_what_an_older_file_lacks() -> None:
    old = Flock.from_json({"kind": "flock", "owner": "Ann", "fleeces": [], "counts": None}, FILE)
    assert (old.counts, old.losses, old.interval, old.sound, old.created) == (
        {},
        (),
        None,
        False,
        "",
    )


def test_whole_numbers_are_numbers_and_null_in_a_list_is_nan() -> None:
    flock = Flock.from_json(written(losses=[1, None]), FILE)
    assert flock.losses[0] == 1.0
    assert math.isnan(flock.losses[1])


def test_a_path_is_shown_by_its_last_part() -> None:
    assert Flock.from_json(written(owner="/home/someone/farm"), FILE).owner == "farm"
    assert Flock.from_json(written(owner={"name": "Ann"}), FILE).owner == "Ann"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"owner": 3}, "owner is 3 where a name was expected"),
        ({"fleeces": {}}, "fleeces is {} where a list was expected"),
        ({"fleeces": [3]}, r"fleeces\[0\] is 3 where an object"),
        ({"fleeces": [{}]}, r"fleeces\[0\].weight is missing where a number"),
        ({"fleeces": [{"weight": True}]}, r"fleeces\[0\].weight is True where a number"),
        ({"counts": {"lambs": -1}}, "counts.lambs is -1 where a whole number"),
        ({"counts": {"lambs": 1.5}}, "counts.lambs is 1.5 where a whole number"),
        ({"counts": {"lambs": 3}}, "counts.lambs is 3 where at most one a fleece"),
        ({"interval": [0.5]}, r"interval is \[0.5\] where a list of 2 values"),
        ({"sound": "yes"}, "sound is 'yes' where true or false"),
    ],
)
def test_an_error_names_the_file_the_key_and_both_values(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ShearlingError, match=f"^flock.json: {said}"):
        Flock.from_json(written(**changes), FILE)


def test_a_writer_may_not_build_what_a_reader_refuses() -> None:
    with pytest.raises(Misfit, match="counts.lambs is 2 where"):
        Flock(owner="Ann", fleeces=(), counts={"lambs": 2})


def test_the_fields_document_themselves() -> None:
    assert list(documented(Flock))[:4] == [
        "- `owner` (text)",
        "- `fleeces` (list of objects): one a sheep",
        "    - `weight` (number): kilograms",
        "    - `colour` (text or null; may be absent)",
    ]
