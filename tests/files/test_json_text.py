"""Numbers that JSON cannot say are null in a list, and refused elsewhere."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from shearling.errors import ShearlingError
from shearling.files.json_text import json_text
from shearling.files.writer import write_json
from shearling.train.log import Log


def test_null_in_a_list() -> None:
    value = {"scores": [1.0, math.nan, (math.inf, 2)], "name": "Lämmer"}
    assert json.loads(json_text(value)) == {"scores": [1.0, None, [None, 2]], "name": "Lämmer"}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_that_is_not_json_is_written(tmp_path: Path, bad: float) -> None:
    with pytest.raises(ShearlingError, match=rf"a result is {bad} \(losses.pen\), but"):
        write_json(tmp_path / "file.json", {"losses": {"pen": bad}})
    assert not (tmp_path / "file.json").exists()
    log = Log(tmp_path / "run", after=0)
    with pytest.raises(ShearlingError, match="losses.pen"):
        log.write({"kind": "eval", "step": 0, "losses": {"pen": bad}})
    log.close()
    assert not (tmp_path / "run" / "log.jsonl").read_text()
